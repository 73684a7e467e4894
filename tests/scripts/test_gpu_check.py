"""The check of a GPU: what it prints and writes, parts that fail, and a rehearsal of every part on a CPU."""

import json
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch

from scripts.gpu_check import __main__ as gpu_check
from scripts.gpu_check.report import Settings, relative_difference
from scripts.gpu_check.speed import LOSS, kind_of, sum_by_kind

REHEARSAL = ("-m", "scripts.gpu_check", "--device", "cpu", "--tiny")


@pytest.mark.slow
def test_two_parts_on_a_cpu(python, tmp_path):
    result = python(*REHEARSAL, "--parts", "1,5", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["device"], found["tiny"], list(found["parts"])) == ("cpu", True, ["1", "5"])
    for part in found["parts"].values():
        assert part["passed"]
        assert part["checks"]
        assert part["tables"]
        assert all(check["passed"] for check in part["checks"])
    assert re.search(r"part 5  loss curves +\d+ s  PASS", result.stdout)
    order = [result.stdout.index(text) for text in ("part 1: ", "PASS  the loss equals", "part 5: ")]
    assert order == sorted(order)


@pytest.mark.slow
def test_the_rehearsal_of_all_parts_passes(python):
    result = python(*REHEARSAL, timeout=900)
    assert len(re.findall(r"^part \d .* PASS$", result.stdout, re.MULTILINE)) == len(gpu_check.PARTS)


def sleep(settings, report):
    report.say("sleeping")
    time.sleep(60)


def fail(settings, report):
    report.check("before the error", True, 1)
    raise ValueError("no such kernel\nmore")


def crash(settings, report):
    os._exit(9)


def miss(settings, report):
    report.at_most("difference", float("nan"), 1.0)
    report.check("other", True, "fine")


def succeed(settings, report):
    report.table("rates", [{"rows": 8, "tokens/s": 12345.6, "ms": 0.12345, "MFU": None}])


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capfd, tmp_path):
    parts = (sleep, fail, crash, miss, succeed)
    monkeypatch.setattr(gpu_check, "PARTS", {i: (part.__name__, part) for i, part in enumerate(parts, start=1)})
    run_part = gpu_check.run_part
    monkeypatch.setattr(gpu_check, "run_part", lambda number, settings: run_part(number, settings, limit=0.5))
    assert gpu_check.main(["--device", "cpu", "--json", str(tmp_path / "found.json")]) == 1
    out = capfd.readouterr().out
    summary = [re.sub(r" +\d+ s ", "", line) for line in out.splitlines()[-5:]]
    assert summary == [
        "part 1  sleep FAIL  not finished after 0 seconds",
        "part 2  fail FAIL  ValueError: no such kernel",
        "part 3  crash FAIL  the process ended with status 9",
        "part 4  miss FAIL  difference",
        "part 5  succeed PASS",
    ]
    assert "  FAIL  difference: nan, at most 1\n  PASS  other: fine\n" in out
    assert "  rates\n    rows  tokens/s     ms  MFU\n       8    12,346  0.123    -\n" in out
    found = json.loads((tmp_path / "found.json").read_text())["parts"]
    assert found["2"]["checks"] == [{"name": "before the error", "passed": True, "found": "1"}]
    assert found["5"]["tables"][0]["rows"][0]["tokens/s"] == 12345.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "1,12"], "--parts 1,12: expected numbers from 1 to 9"),
        (["--peer", "megatron"], "--peer megatron=: expected transformers, or nanogpt=DIR"),
        (["--peer", "nanogpt=/nowhere"], "--peer nanogpt=/nowhere: expected transformers, or nanogpt=DIR"),
        (["--json", "/nowhere/found.json"], "there is no directory /nowhere"),
    ],
)
def test_impossible_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_relative_difference():
    one = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert relative_difference(one, one) == 0
    assert relative_difference([one[0], torch.tensor([4.5])], one) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_64x3_tn_align8>", "products"),
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT", "products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", "attention"),
        ("triton_red_fused__to_copy_native_layer_norm_0", "elementwise"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("aten::addmm", "products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
    ],
)
def test_the_kind_of_a_kernel(name, kind):
    assert kind_of(name) == kind


def event(name, device="CPU", us=0.0, parent=None, kernels=()):
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        is_user_annotation=False,
        self_cpu_time_total=us,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


def test_kernels_of_the_loss_count_as_the_loss_and_all_others_by_their_name():
    loss = event(LOSS)
    events = [
        loss,
        event("aten::mm", parent=loss, kernels=[("gemm", 2000)]),
        event("aten::mm", kernels=[("gemm", 5000)]),
        event("gemm", "CUDA", 2000),
        event("gemm", "CUDA", 5000),
        event("flash_fwd", "CUDA", 3000),
        event("triton_poi_fused_add", "CUDA", 1000),
    ]
    times = sum_by_kind(SimpleNamespace(events=lambda: events), "cuda")
    expected = {"products": 5, "loss": 2, "attention": 3, "elementwise": 1, "optimizer": 0, "copies": 0}
    assert times == expected


def test_speed_is_compared_with_targets_on_a_gpu_and_in_full_size_only():
    assert [Settings(device=d, tiny=t).is_timed for d in ("cpu", "cuda") for t in (True, False)] == [0, 0, 0, 1]
