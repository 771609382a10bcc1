"""Stand-ins for what the commands of the documents name: images, networks, runs, stores and a hub's cache, all tiny.

A document's `my-vae` is the `vae` of here, its PHOTOGRAPHS the `photographs`; NAMES has them all. Each is made once,
when a command first asks for it, and copied to where that command runs.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from cut_outs import write_cut_outs
from datasets import Dataset, Image
from fork_server import fork
from images import write_images
from repository import ROOT
from sound_files import RATE, encoded, tone, write_sounds
from tiny_classes import tiny
from tiny_pipeline import pipeline
from training_runs import TINY
from videos import write_moving, write_video

from ldm_vae import cli, load_autoencoder, open_images, write_store, write_vae
from ldm_vae.autoencoder.codebooks import Shape, put_beside
from ldm_vae.autoencoder.config import AutoencoderConfig
from ldm_vae.autoencoder.normalisation import Normalisation
from ldm_vae.models.dac import Config as Dac

# f = 8 and 4 channels, as Stable Diffusion's, with its quant convs
SHAPE: dict[str, Any] = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
IMAGES = 8
COMMIT = "0" * 40

SHORT_RUN = ("--max_train_images", 16, "--validation_images", 4)
# the documents' names of each stand-in
NAMES = {
    "photographs": "photographs my_photographs PHOTOGRAPHS PHOTOS DATA HELD_OUT PICTURES IMAGENET/train",
    "scans": "SCANS scans",
    "photographs.zip": "photographs.zip",
    "chosen.txt": "chosen.txt",
    "saved": "saved",
    "table.parquet": "table.parquet",
    "shards": "shards",
    "panorama.jpg": "panorama.jpg",
    "demo_images": "data/demo photos",
    "digits": "data/digits",
    "factors": "data/factors",
    "vae": "my-vae VAE SRC vae-a vae-b sd-vae old-vae my-tiny-vae TEACHER plain",
    "vae.safetensors": "my-vae.safetensors",
    "scrambled": "scrambled",
    "pipeline": "my-pipeline",
    "run": "runs/mine runs/demo runs/noise runs/linear",
    "holdout_run": "runs/photographs",
    "textbook_run": "runs/textbook_vae",
    "store": "my-latents STORE",
    "clip_store": "my-clips",
    "large_store": "one",
    "other_store": "two",
    "demo_store": "runs/demo/latents",
    "vq_run": "runs/vq_demo",
    "vq_store": "runs/vq_demo/latents",
    "vq_heldout": "runs/vq_demo/heldout",
    "prior_run": "runs/prior",
    "factors_run": "runs/factors_vq",
    "factors_store": "runs/factors_vq/latents",
    "factors_heldout": "runs/factors_vq/heldout",
    "factors_prior": "runs/factors_prior",
    "parquet_store": "out",
    "cache_of_kohya": "their-cache",
    "config": "CONFIG",
    "cut_outs": "cut-outs",
    "clips": "clips",
    "film": "data/film",
    "films": "films",
    "film.mp4": "film.mp4",
    "video_vae": "my-video-vae tuned-video-vae",
    "audio_vae": "my-audio-vae tuned-audio-vae",
    "music": "music",
    "speech.flac": "speech.flac",
    "audio_store": "my-sounds",
    "codec": "my-codec",
    "code_store": "my-codes",
    "cut_outs.yaml": "cut_outs.yaml",
    "my_lab": "my_lab",
    "hub_cache": "hub_cache",
}
STAND_INS = {name: stand_in for stand_in, names in NAMES.items() for name in names.split()}


class StandIns:
    """Maker of the stand-ins, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def get(self, name: str) -> Path:
        """The path of a stand-in."""
        path = self.folder / name
        if not path.exists():
            made = self.folder / f".{name}"  # under its name when it is complete
            getattr(self, name.replace(".", "_"))(made)
            made.rename(path)
        return path

    def copy(self, name: str, to: Path) -> None:
        path = self.get(name)
        to.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, to)

    def call(self, *words: object) -> None:
        done = fork(cli.main, [*map(str, words)], None, self.folder).wait(600)
        assert done.returncode == 0, done.stderr

    # --- images ---------------------------------------------------------------------------------------------------

    def photographs(self, out: Path) -> None:
        """In four folders, which are classes; no picture twice."""
        write_images(out, IMAGES, (272, 288))
        for number, path in enumerate(sorted(out.iterdir())):
            label = out / f"class_{number % 4}"
            label.mkdir(exist_ok=True)
            path.rename(label / path.name)

    def scans(self, out: Path) -> None:
        """Without folders, named by patient."""
        write_images(out, 4)

    def photographs_zip(self, out: Path) -> None:
        with zipfile.ZipFile(out, "w") as archive:
            for path in sorted(self.get("photographs").rglob("*.png")):
                archive.write(path, path.name)

    def chosen_txt(self, out: Path) -> None:
        out.write_text("".join(f"{path}\n" for path in sorted(self.get("photographs").rglob("*.png"))))

    def _rows(self) -> Dataset:
        files = [str(path) for path in sorted(self.get("photographs").rglob("*.png"))]
        return Dataset.from_dict({"image": files}).cast_column("image", Image())

    def saved(self, out: Path) -> None:
        self._rows().save_to_disk(str(out))

    def table_parquet(self, out: Path) -> None:
        self._rows().to_parquet(str(out))

    def shards(self, out: Path) -> None:
        out.mkdir()
        file = next(self.get("photographs").rglob("*.png")).read_bytes()
        for number in range(100):
            with tarfile.open(out / f"{number:03d}.tar", "w") as shard:
                member = tarfile.TarInfo(f"sample{number}.png")
                member.size = len(file)
                shard.addfile(member, io.BytesIO(file))

    def panorama_jpg(self, out: Path) -> None:
        from PIL import Image as Pictures

        with Pictures.open(next(self.get("photographs").rglob("*.png"))) as picture:
            picture.resize((768, 512)).save(out, format="JPEG")

    def demo_images(self, out: Path) -> None:
        self.call("assets", "demo", out)

    def digits(self, out: Path) -> None:
        self.call("assets", "digits", out)

    def factors(self, out: Path) -> None:
        self.call("assets", "factors", out)

    def cut_outs(self, out: Path) -> None:
        write_cut_outs(out / "train", 16)
        write_cut_outs(out / "heldout", 4, seed=1)

    def clips(self, out: Path) -> None:
        """Folders of numbered frames."""
        for name in ("a", "b"):
            write_images(out / name, 17, (32, 32))

    def film(self, out: Path) -> None:
        (out / "film").mkdir(parents=True)
        write_video(out / "film" / "0.mkv", 17)

    def films(self, out: Path) -> None:
        write_moving(out, 2, 17)

    def music(self, out: Path) -> None:
        write_sounds(out, 2)

    def speech_flac(self, out: Path) -> None:
        out.write_bytes(encoded(tone(RATE), "FLAC"))

    def film_mp4(self, out: Path) -> None:
        write_video(out, 17, codec="mpeg4")

    # --- networks and runs ------------------------------------------------------------------------------------------

    def vae(self, out: Path) -> None:
        torch.manual_seed(0)
        network = AutoencoderConfig(**SHAPE).build().eval()
        write_vae(network, out, Normalisation.from_config({"scaling_factor": 0.9}), sample_size=64)

    def video_vae(self, out: Path) -> None:
        tiny("AutoencoderKLWan").save_pretrained(out)

    def audio_vae(self, out: Path) -> None:
        write_vae(tiny("AutoencoderOobleck", audio_channels=1), out, None)

    def codec(self, out: Path) -> None:
        vae = Dac(sampling_rate=RATE, encoder_hidden_size=4, decoder_hidden_size=16, downsampling_ratios=[2, 4]).build()
        books = Shape(kind="residual", channels=16, codebooks=8, codes=16, code_dim=4, distance="cosine").build()
        write_vae(put_beside(vae, books), out, None)

    def vae_safetensors(self, out: Path) -> None:
        file = self.folder / "single.safetensors"
        self.call("export", self.get("vae"), file, "--target", "comfyui")
        file.rename(out)

    def scrambled(self, out: Path) -> None:
        shutil.copytree(self.get("vae"), out)

    def pipeline(self, out: Path) -> None:
        pipeline(load_autoencoder(self.get("vae")), self.folder / "words").save_pretrained(out)

    def config(self, out: Path) -> None:
        settings = TINY | {"output_dir": "runs/tiny", "data": {"kind": "folder", "path": "photographs"}}
        out.write_text(yaml.safe_dump(settings))

    def run(self, out: Path) -> None:
        """64 images, validated, with checkpoints."""
        photographs = {"kind": "folder", "path": str(self.get("photographs"))}
        self._train(out, {"data": photographs, "validation_data": photographs})

    def holdout_run(self, out: Path) -> None:
        """The same with half of the images held out."""
        self._train(out, {"data": {"kind": "folder", "path": str(self.get("photographs")), "holdout": 0.5}})

    def _train(self, out: Path, images: dict[str, Any]) -> None:
        settings = TINY | images | {
            "output_dir": str(out), "model": SHAPE, "max_train_images": 64, "validate_every_images": 32,
            "validation_images": 4, "best_metric": "psnr", "validation_metrics": ["psnr"],
        }  # fmt: skip
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        self.call("train", file)

    def textbook_run(self, out: Path) -> None:
        paths = ("--data.path", self.get("digits") / "train", "--validation_data.path", self.get("digits") / "heldout")
        self.call("train", "textbook_vae", "--output_dir", out, *paths, "--max_train_images", 128)

    def vq_run(self, out: Path) -> None:
        data = self.get("demo_images")
        paths = ("--data.path", data / "train", "--validation_data.path", data / "heldout")
        self.call("train", "vq_demo", "--output_dir", out, *paths, *SHORT_RUN, "--init_images", 64)

    def factors_run(self, out: Path) -> None:
        data = self.get("factors")
        paths = ("--data.path", data / "train", "--validation_data.path", data / "heldout")
        self.call("train", "factors_vq", "--output_dir", out, *paths, *SHORT_RUN)

    def factors_store(self, out: Path) -> None:
        self._factors_indices(out, "train")

    def factors_heldout(self, out: Path) -> None:
        self._factors_indices(out, "heldout", "--pixels")

    def _factors_indices(self, out: Path, part: str, *more: str) -> None:
        self.call("encode", self.get("factors_run") / "vae", self.get("factors") / part, out, "--resolution", 16, *more)

    def factors_prior(self, out: Path) -> None:
        stores = ("--latents", self.get("factors_store"), "--validation_latents", self.get("factors_heldout"))
        vae = ("--vae", self.get("factors_run") / "vae")
        self.call("prior", "prior/factors", "--output_dir", out, *stores, *vae, "--max_train_images", 64,
                  "--validation_images", 8)  # fmt: skip

    def prior_run(self, out: Path) -> None:
        stores = ("--latents", self.get("vq_store"), "--validation_latents", self.get("vq_heldout"))
        short = ("--max_train_images", 32, "--sample_images", 4, "--validation_images", 8, "--model.num_layers", 1)
        self.call("prior", "prior/demo", *stores, "--output_dir", out, *short)

    def cut_outs_yaml(self, out: Path) -> None:
        """The config of docs/training.md, and the demo's that it includes."""
        page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
        (found,) = re.findall(r"```yaml\n(# cut_outs\.yaml\n.*?)```", page, re.DOTALL)
        out.write_text(found.replace("include: demo.yaml", f"include: {ROOT / 'configs' / 'demo.yaml'}"))

    def my_lab(self, out: Path) -> None:
        """The modules of docs/extending.md."""
        page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
        out.mkdir()
        for name, code in re.findall(r"```python\n# my_lab/(\w+\.py)\n(.*?)```", page, re.DOTALL):
            (out / name).write_text(code)

    # --- stores and a hub ---------------------------------------------------------------------------------------------

    def _encode(self, out: Path, images: str, **more: Any) -> None:
        vae = load_autoencoder(self.get("vae"))
        write_store(vae, open_images(self.folder / images, vae), out, **{"resolution": 256} | more)

    def store(self, out: Path) -> None:
        self.get("photographs")
        self._encode(out, "photographs", vae_name=str(self.get("vae")))

    def clip_store(self, out: Path) -> None:
        """Of a tiny Wan, whose latents have the channels of the published one's."""
        vae = tiny("AutoencoderKLWan")
        write_store(vae, open_images(self.get("film") / "film", vae, frames=5), out, resolution=32)

    def audio_store(self, out: Path) -> None:
        vae = load_autoencoder(self.get("audio_vae"))
        write_store(vae, open_images(self.get("music"), vae, samples=512), out, resolution=512)

    def code_store(self, out: Path) -> None:
        vae = load_autoencoder(self.get("codec"))
        write_store(vae, open_images(self.get("music"), vae, samples=512), out, resolution=512,
                    vae_name=str(self.get("codec")))  # fmt: skip

    def large_store(self, out: Path) -> None:
        """1,000 samples of four classes, one position each."""
        for label in range(4):
            write_images(self.folder / "many" / f"class_{label}", 250, (8, 8))
        self._encode(out, "many", resolution=8, shard_size=250)

    def other_store(self, out: Path) -> None:
        self.get("table.parquet")
        self._encode(out, "table.parquet", resolution=8, shard_size=250)

    def demo_store(self, out: Path) -> None:
        vae = load_autoencoder(self.get("run"))
        source = open_images(self.get("demo_images") / "photographs", vae)
        write_store(vae, source, out, resolution=256, vae_name=str(self.get("run") / "vae"))

    def _indices(self, out: Path, images: str, **more: Any) -> None:
        vae = load_autoencoder(self.get("vq_run"))
        source = open_images(self.get("demo_images") / images, vae)
        write_store(vae, source, out, vae_name=str(self.get("vq_run") / "vae"), **more)

    def vq_store(self, out: Path) -> None:
        self._indices(out, "train", resolution=96)

    def vq_heldout(self, out: Path) -> None:
        self._indices(out, "heldout", resolution=64, pixels=True)

    def parquet_store(self, out: Path) -> None:
        self.call("store", "convert", self.get("store"), out, "--to", "parquet")

    def cache_of_kohya(self, out: Path) -> None:
        self.call("store", "convert", self.get("store"), out, "--to", "kohya", "--model", "sdxl")
        for file in (*out.rglob("store.json"), *out.rglob("columns.parquet")):
            file.unlink()  # which their program does not write

    def hub_cache(self, out: Path) -> None:
        """`stabilityai/sd-vae-ft-mse` as huggingface_hub keeps it."""
        place = out / "models--stabilityai--sd-vae-ft-mse"
        shutil.copytree(self.get("vae"), place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(COMMIT)
        config = place / "snapshots" / COMMIT / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.18215}))


MAKERS: dict[str, Callable[..., None]] = {name: getattr(StandIns, name.replace(".", "_")) for name in NAMES}
