"""Run every shell command of README, CONTRIBUTING, docs/ and the configs' headers, as it is written there.

    python -m tests.docs_commands                      # all, from the root: minutes; a line for each
    python -m tests.docs_commands --only training.md   # those of one page, or that hold these words
    python -m tests.docs_commands --new                # those that tests/docs_commands.md does not have yet

Each block of code runs in an empty folder with stand-ins for what it names (tests/helpers/stand_ins.py). Nothing of a
command is replaced but by what SHORTER appends to make it short. (With --dry_run, which computes a plan, the
launcher in front of it is left out: it costs more than the plan, and other commands start it.) What cannot be run here
has a row in tests/docs_commands.md with its reason, which people write; the rows of those that were run are written
there by this program. A fast test (tests/test_documents.py) compares that file with the documents. The exit status is
1 if a command failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))  # run with -m from the root, without pytest's `pythonpath`

from accelerate.commands import accelerate_cli
from command_record import Record
from documents import Command, all_commands
from fork_server import AT_FIRST, fork
from repository import ROOT
from stand_ins import STAND_INS, StandIns

from ldm_vae import cli

SHORT_RUN = "--max_train_images 16 --validation_images 4 --normalisation_images 8"
# what is appended to a command that matches, so that it takes seconds: all of it is said in tests/docs_commands.md
SHORTER = [
    (r"train factors_vq", f"{SHORT_RUN} --validate_every_images 16"),
    (r"train r?vq_demo", f"{SHORT_RUN} --validate_every_images 16 --init_images 64"),
    (r"train (kl_|vq_|dvae_|dc_|wan_|finetune_(decoder_sd|sdxl|flux)|tiny)(?!.*--latent_store)", "--dry_run"),
    (r"train smoke .*data/moving_digits", "--max_train_images 8 --normalisation_images 8"),
    (r"train demo --init noise", f"{SHORT_RUN} --ema_halflife_images 4 --validate_every_images 16"),
    (r"train (configs/)?(demo|cut_outs)\b.*--init noise",
     f"{SHORT_RUN} --validate_every_images 16 --adversary.start_images 8 --adversary.warmup_images 4"),
    (r"train (configs/)?(demo|cut_outs)\b", f"{SHORT_RUN} --validate_every_images 16 --init_images 64"),
    (r"train photographs (?!.*--dry_run)",
     f"{SHORT_RUN} --data.holdout 0.5 --validate_every_images 16 --init_images 64"),
    (r"train photographs ", "--data.holdout 0.5"),
    (r"train CONFIG .*--data.holdout", "--data.holdout 0.5"),
    (r"train textbook", "--max_train_images 256 --validate_every_images 256"),
    (r"train finetune_decoder_sd --latent_store",
     "--max_train_images 4 --train_batch_size 2 --mixed_precision no --dataloader_num_workers 0 --losses.lpips.net "
     "alex --model.block_out_channels 8 8 16 16 --model.layers_per_block 1 --model.norm_num_groups 4 "
     "--discriminator.width 8"),
    (r"diffuse diffusion/demo",
     "--max_train_images 32 --sample_every_images 32 --sample_images 4 --measure_images 8 --sampling.steps 2"),
    (r"prior prior/demo",
     "--max_train_images 32 --sample_every_images 32 --sample_images 4 --validation_images 8 --model.num_layers 1"),
    (r"prior prior/factors", "--max_train_images 64 --validation_images 8 --validate_every_images 64"),
    (r"eval.shuffle", "--shards 32 --windows 4 32"),
    (r"eval.modes evidence", "--images 640 --steps 40"),
    (r"eval.modes disentanglement", "--images 640 --seeds 1"),
    (r"ldm-vae probe",
     "--layers 1 --heads 2 --head_dim 8 --train_images 8 --batch_size 4 --seeds 1 --samples 4 --steps 1"),
    (r"evaluate .*(--resolution 256|PHOTOS --output measured)", "--metrics psnr,ssim"),
    (r"evaluate .*--frames", "--metrics psnr,ssim,flicker"),
    (r"latent_space .*--bank", "--bank 16 --likelihood_images 2 --components 2"),
    (r"latent_space ", "--bank 8 --likelihood_images 2 --components 2"),
]  # fmt: skip

# stand-ins that a command reads without naming them
READS = [
    (r"train .*(\b(vq_)?demo\b|cut_outs)", "data/demo"),
    (r"prior prior/demo", "runs/vq_demo"),
    (r"prior prior/demo", "runs/vq_demo/latents"),
    (r"prior prior/demo", "runs/vq_demo/heldout"),
    (r"cut_outs\.yaml", "cut-outs"),
    (r"train CONFIG", "photographs"),
    (r"my_lab", "my_lab"),
    (r"train textbook", "data/digits"),
    (r"train factors_vq", "data/factors"),
    (r"prior prior/factors", "runs/factors_vq"),
    (r"prior prior/factors", "runs/factors_vq/latents"),
    (r"prior prior/factors", "runs/factors_vq/heldout"),
    (r"scrambled", "plain"),
]
# positional argument that each verb writes: it is not there before the command, except where that goes on with it
WRITES = {"export": 1, "encode": 2, "store merge": -1, "store split": 1, "store convert": 1, "store pull": 1,
          "fp16 fix": 1, "reconstruct": -1, "decode": 1, "eval.scramble": 2, "compress": -1,
          "decompress": 1}  # fmt: skip
GOES_ON = re.compile(r"--update|--pipeline|evaluate .*runs/demo/report")
FORKED = {"ldm-vae": cli.main, "accelerate": accelerate_cli.main}
LIMIT = 600  # seconds of a command


def outputs(text: str) -> list[str]:
    """Paths that the command creates."""
    found = re.findall(r"--output(?:_dir)? (\S+)", text)
    for verb, place in WRITES.items():
        if match := re.search(rf"(?:^ldm-vae|-m ldm_vae|-m) {re.escape(verb)} ((?:[^-\s]\S* ?)+)", text):
            found.append(match[1].split()[place])
    return [] if GOES_ON.search(text) else found


def shortened(text: str) -> tuple[str, str]:
    """The command with what makes it short, and that alone."""
    added = next((added for pattern, added in SHORTER if re.search(pattern, text)), "")
    for flag in re.findall(r"--\S+", added):  # a flag that stands twice is refused
        text = re.sub(rf" {re.escape(flag)}( (?!--)\S+)*", "", text)
    return f"{text} {added}".strip(), added


def provide(text: str, here: Path, stand_ins: StandIns) -> None:
    """Bring the stand-ins that a command reads, and take away what it is to create."""
    written = outputs(text)
    for name in [*written, *(["out"] if " --from " in text else [])]:  # of the format that it is read as
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    named = [word.strip("\"'") for word in text.split()]
    named += [name for pattern, name in READS if re.search(pattern, text)]
    for name in sorted(STAND_INS, key=len):  # a run before the store in it
        used = any(word == name or word.startswith(f"{name}/") for word in named)
        if used and name not in written and not (here / name).exists():
            stand_ins.copy(STAND_INS[name], here / name)


def execute(text: str, here: Path) -> tuple[int, str]:
    """The exit status, and what was said."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"PYTHONPATH": str(ROOT), "PATH": path, "PYTHONWARNINGS": "ignore"}
    if text.endswith(" --dry_run"):
        text = re.sub("^accelerate launch -m ldm_vae ", "ldm-vae ", text)
    program, *words = shlex.split(text)
    if program in FORKED and "&&" not in words:  # without the seconds of an interpreter that imports torch
        child = fork(FORKED[program], words, environment, here)
        try:
            done = child.wait(LIMIT)
        except TimeoutError as late:
            return 124, str(late)
        return done.returncode, done.stdout + done.stderr
    try:
        shell = subprocess.run(
            ["bash", "-c", text], cwd=here, env=os.environ | environment, timeout=LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return 124, str(late)
    return shell.returncode, shell.stdout


def run_block(block: list[Command], stand_ins: StandIns, record: Record) -> int:
    """Run commands of one block one after the other in a folder of their own; how many failed."""
    failed = 0
    with tempfile.TemporaryDirectory(dir=stand_ins.folder.parent) as name:
        here = Path(name)
        for part in ("configs", "eval", "train"):
            (here / part).symlink_to(ROOT / part)
        for command in block:
            provide(command.text, here, stand_ins)
            short, added = shortened(command.text)
            began = time.monotonic()
            status, said = execute(short, here)
            took = time.monotonic() - began
            print(f"{'ok    ' if status == 0 else 'FAILED'} {took:6.1f} s  {command.page}: {command.text}", flush=True)
            if status == 0:
                record.ran(command.text, added, took, datetime.date.today().isoformat())
                continue
            failed += 1
            print(
                f"       status {status}, with `{added}`\n"
                + "\n".join(f"       | {line}" for line in said.splitlines()[-12:])
            )
    return failed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.docs_commands", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of a page's name, or of a command")
    parser.add_argument("--new", action="store_true", help="only those without a row in tests/docs_commands.md")
    asked = parser.parse_args(arguments)
    record = Record.read()
    known = record.known if asked.new else set(record.not_run)
    chosen = [one for one in all_commands() if asked.only in f"{one.page} {one.text}" and one.text not in known]
    done: set[str] = set()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "stand_ins"
        # libraries read this when they are imported: in the server that forks, too
        environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(place / "hub_cache"), "OMP_NUM_THREADS": "1"}
        os.environ |= environment
        AT_FIRST.update(environment)
        stand_ins = StandIns(place)
        stand_ins.get("hub_cache")
        for _, group in groupby(chosen, key=lambda one: (one.page, one.block)):
            block = [one for one in group if one.text not in done]  # the same words on two pages run once
            failed += run_block(block, stand_ins, record)
            done |= {one.text for one in block}
            record.write()
    print(f"{len(done)} commands, {failed} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
