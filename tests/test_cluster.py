"""Job files of configs/cluster, run as a shell runs them, with stand-ins for the scheduler's commands and Ray's."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from repository import ROOT

from ldm_vae.cli import parser
from ldm_vae.core.ownership import Part

JOBS = ROOT / "configs" / "cluster"


def run(job: str, folder: Path, *words: str, **slurm: str) -> list[list[str]]:
    """Run a job file; the commands that it would start with `srun`, argument by argument."""
    stand_ins = {"scontrol": "echo first\necho second", "srun": 'exec "$@"'}
    # what srun starts writes its arguments down, a line each, and an empty one between commands
    stand_ins |= dict.fromkeys(("ldm-vae", "accelerate", "ray"), 'printf "%s\\n" "$@" "" >> "$STARTED"')
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    started = folder / "started"
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "STARTED": str(started)} | slurm
    subprocess.run(["bash", JOBS / job, *words], env=environment, check=True)
    return [one.splitlines() for one in started.read_text().split("\n\n") if one]


@pytest.mark.parametrize(("more", "expected"), [({}, Part(7, 64)), ({"PARTS": "128"}, Part(7, 128))])
def test_each_task_of_an_array_encodes_its_part(tmp_path: Path, more: dict[str, str], expected: Part) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MAX": "64"} | more
    (words,) = run("encode_array.sbatch", tmp_path, "VAE", "my photographs", "OUT", "--resolution", "256", **array)
    assert words[:-2] == ["encode", "VAE", "my photographs", "OUT", "--resolution", "256"]
    assert words[-2] == "--job_part" and Part.parse(words[-1], "--job_part") == expected


@pytest.mark.parametrize("node", [0, 1])
def test_a_launcher_on_each_node(tmp_path: Path, node: int) -> None:
    job = {"SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8"}
    (words,) = run("train.sbatch", tmp_path, "kl_f8_d4", "--data.path", "my data", **job, SLURM_NODEID=str(node))
    assert words[0] == "launch"
    launch = launch_command_parser().parse_args(words[1:])  # as Accelerate's own program reads them
    assert (launch.num_machines, launch.machine_rank, launch.num_processes) == (2, node, 16)
    assert launch.main_process_ip == "first" and 20_000 <= int(launch.main_process_port) < 40_000
    assert launch.module and launch.training_script == "ldm_vae"
    assert launch.training_script_args == ["train", "kl_f8_d4", "--data.path", "my data"]


def test_a_job_of_a_ray_cluster(tmp_path: Path) -> None:
    data = ["VAE", "my photographs", "OUT"]
    (words,) = run("ray_job.sh", tmp_path, *data, "--actors", "64", RAY_ADDRESS="http://head:8265")
    assert words[:6] == ["job", "submit", "--address", "http://head:8265", "--", "ldm-vae"]
    asked = parser().parse_args(words[6:])  # as the verb reads them
    assert [asked.vae, asked.data, asked.out, asked.engine, asked.actors] == [*data, "ray", 64]
