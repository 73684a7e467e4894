"""Write the arrays of a .npz file as OpenAI's code does: `write_tensorflow_checkpoint.py ARRAYS.npz DIRECTORY`.

This needs tensorflow-cpu, which the repository does not. tests/test_openai_checkpoint.py starts it where it is
installed, and made tests/fixtures/openai with it.
"""

import os
import sys

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1
with tf1.Graph().as_default(), tf1.Session() as session:
    arrays = np.load(sys.argv[1])
    variables = [tf1.get_variable(name, initializer=arrays[name]) for name in arrays.files]
    session.run(tf1.global_variables_initializer())
    os.chdir(sys.argv[2])  # TensorFlow writes the path that it is given into the file `checkpoint`
    tf1.train.Saver(variables).save(session, "model.ckpt", write_meta_graph=False)
