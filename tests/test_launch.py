"""Launching: what a program may believe of how it was started, and what several processes agree on."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from launcher import free_port, launch
from sentences import refused

from ldm_vae.core.errors import UsageError
from ldm_vae.core.launch import (
    StopSignal,
    build_accelerator,
    check_agreement,
    check_processes,
    check_ranks_agree,
)


def test_a_port_is_given_to_nobody_before_it_is_used() -> None:
    port = free_port()
    with pytest.raises(OSError), socket.socket() as other:
        other.bind(("127.0.0.1", port))
    for _ in range(2):  # it can be used again
        store = torch.distributed.TCPStore("127.0.0.1", port, 1, True, wait_for_workers=False)
        store.set("name", "value")
        assert store.get("name") == b"value"
        del store


def test_fp16_on_a_cpu_is_refused() -> None:
    if torch.cuda.is_available():
        assert build_accelerator("fp16").scaler is not None
        return
    with pytest.raises(UsageError, match="mixed_precision"):  # only where there is no GPU, so not golden
        build_accelerator("fp16")


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    with refused(UsageError, "launch") as error:
        check_processes(1, {"WORLD_SIZE": "2"}, [])
    assert "2 processes" in str(error.value) and "sees 1" in str(error.value)
    check_processes(2, {"WORLD_SIZE": "2"}, ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "x.py"])


def test_several_that_silently_became_one_are_refused(tmp_path: Path) -> None:
    for launcher in (["/usr/bin/accelerate", "launch"], ["python", "-W", "ignore", "-m", "accelerate.commands.launch"]):
        with refused(UsageError, "launch") as error:
            check_processes(1, {}, [*launcher, "--cpu", "--num_processes", "2", "x.py"])
        assert "2 processes" in str(error.value)
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    with refused(UsageError, "--multi_gpu"):
        check_processes(1, {}, ["python", "accelerate", "launch", f"--config_file={tmp_path / 'two.yaml'}", "x.py"])
    check_processes(1, {}, ["accelerate", "launch", "--num_processes", "1", "x.py"])
    check_processes(1, {}, ["bash", "-c", "something --num_processes 2"])


LAUNCHER = ["accelerate", "launch"]
STEPS, PRECISION = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"


@pytest.mark.parametrize(
    ("environment", "options", "field", "theirs"),
    [
        ({STEPS: "3"}, [], "gradient_accumulation_steps", "3"),
        ({STEPS: "1"}, [], "gradient_accumulation_steps", "1"),
        ({STEPS: "auto"}, [], "gradient_accumulation_steps", "auto"),
        ({}, ["--gradient_accumulation_steps", "3"], "gradient_accumulation_steps", "3"),
        ({}, ["--gradient-accumulation-steps=3"], "gradient_accumulation_steps", "3"),
        ({PRECISION: "fp16"}, [], "mixed_precision", "fp16"),
        ({PRECISION: "fp8"}, ["--mixed_precision", "fp8"], "mixed_precision", "fp8"),
        ({}, ["--gradient_clipping", "1.0"], "gradient_clipping", "max_grad_norm"),
    ],
)
def test_a_launch_that_would_change_the_config_is_refused(
    environment: dict[str, str], options: list[str], field: str, theirs: str
) -> None:
    with pytest.raises(UsageError) as error:
        check_agreement("bf16", 2, environment, [*LAUNCHER, *options, "-m", "train.autoencoder", "x.yaml"])
    assert field in str(error.value) and theirs in str(error.value)


def test_a_launch_that_agrees_is_taken_and_what_is_left_aside_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    program = ["-m", "train.autoencoder", "x.yaml", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"]
    check_agreement("bf16", 2, {STEPS: "2", PRECISION: "bf16"}, [*LAUNCHER, *program])
    check_agreement("bf16", 2, {PRECISION: "no"}, [*LAUNCHER, *program])  # the launcher's default, no wish
    check_agreement("no", 1, {}, [])
    check_agreement(None, None, {STEPS: "4", PRECISION: "no"}, [])  # nothing accumulates there
    assert capsys.readouterr().err == ""
    check_agreement("bf16", 2, {PRECISION: "no"}, [*LAUNCHER, "--mixed_precision", "no", *program])
    said = capsys.readouterr().err
    assert "--mixed_precision no" in said and "bf16" in said
    check_agreement(None, None, {PRECISION: "fp16"}, [])
    said = capsys.readouterr().err
    assert "--mixed_precision fp16" in said and "fp32" in said
    check_agreement(None, None, {PRECISION: "fp16", "RANK": "1"}, [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "variables",
    [
        {STEPS: "3"},
        {STEPS: "many"},
        {PRECISION: "bf16"},
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
        {"ACCELERATE_USE_FSDP": "true"},
        {"ACCELERATE_USE_DEEPSPEED": "yes"},
    ],
    ids=lambda variables: " ".join(f"{name}={value}" for name, value in variables.items()),
)
def test_no_variable_changes_a_training_in_silence(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError):
        build_accelerator("no", gradient_accumulation_steps=2)


@pytest.mark.slow
def test_a_launch_that_is_silently_one_ends_with_status_2(tmp_path: Path) -> None:
    script = tmp_path / "one.py"
    script.write_text(
        "from ldm_vae.core.errors import run_program\nfrom ldm_vae.core.launch import build_accelerator\n"
        "run_program(lambda: print(build_accelerator().num_processes))\n"
    )
    done = launch([str(script)], "--cpu", "--num_processes", "2")
    assert "error: launch: 2 processes were asked for and one was started" in done.stderr
    assert "exit status 2" in done.stderr  # Accelerate's launcher reports its child's


def test_a_signal_is_remembered_until_the_step_ends() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        stop = StopSignal()
        accelerator = Accelerator(cpu=True)
        assert stop.agreed(accelerator) == 0  # nothing yet
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(accelerator) == signal.SIGTERM
        with pytest.raises(SystemExit) as second:
            os.kill(os.getpid(), signal.SIGINT)
        assert second.value.code == 130
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)


DIVERGE = """
import torch
from ldm_vae.core.launch import build_accelerator, check_ranks_agree, check_same
from ldm_vae.core.errors import WorkError
a = build_accelerator()
assert a.num_processes == 2
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
check_ranks_agree(a, {"net": net})
if a.process_index == 1:
    with torch.no_grad():
        net[1].weight[0, 0] = torch.nextafter(net[1].weight[0, 0], torch.tensor(9.0))  # one bit on one rank
try:
    check_ranks_agree(a, {"net": net})
except WorkError as error:
    print(f"RANK{a.process_index} {error}", flush=True)
check_same(a, "images seen", 16)
try:
    check_same(a, "images seen", 16 * a.process_index)
except WorkError as error:
    print(f"RANK{a.process_index} {error}", flush=True)
a.end_training()
"""


@pytest.mark.slow
def test_one_bit_on_one_rank_is_found_and_named(tmp_path: Path) -> None:
    """Launched by the file that the documentation names."""
    script = tmp_path / "diverge.py"
    script.write_text(DIVERGE)
    done = launch([str(script)], file="configs/accelerate/two_cpu_processes.yaml")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"RANK{rank} ranks diverged: net.1.weight on rank(s) [1] is not what rank 0 has" in done.stdout
        assert f"RANK{rank} images seen: the processes have [0, 16]" in done.stdout


def test_a_single_process_agrees_with_itself() -> None:
    check_ranks_agree(Accelerator(cpu=True), {})
    assert build_accelerator().num_processes == 1
