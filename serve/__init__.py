"""A local server for a model: a page to try it, and OpenAI's protocol for completions.

completions.py  what a request may contain, and the parts of a response
engine.py       one queue, and one thread that generates text
app.py          the ASGI application and the command `sample.py --serve`
page.html       the page; its script is page.js
"""
