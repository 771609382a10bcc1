"""Lossless compression: digits come back to the bit, in as many bits as the evidence lower bound says, in any process;
and whatever is wrong with a file is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_call import call
from compression_runs import summed, train_on_digits, with_header
from diffusers import AutoencoderKL
from fork_server import fork
from images import write_images
from PIL import Image
from sentences import refused
from tiny_networks import network
from training_runs import metrics

from ldm_vae import cli
from ldm_vae.commands import doctor
from ldm_vae.compression import bits_back, entropy_coder, file
from ldm_vae.compression.bits_back import BitsBack, load_likelihood
from ldm_vae.compression.file import DIGEST, FIXED, MAGIC, Header, decode, parts_of, read, write
from ldm_vae.compression.inputs import read_images
from ldm_vae.core.errors import UsageError, WorkError
from ldm_vae.data.named_images import find_images
from ldm_vae.data.source import open_source
from ldm_vae.demo.digits import prepare_digits
from ldm_vae.losses.gaussian_nll import Config as GaussianNLLConfig
from ldm_vae.losses.gaussian_nll import GaussianNLL
from ldm_vae.losses.kl import Config as KL
from ldm_vae.metrics.batches import image_batches
from ldm_vae.metrics.bound import evidence_bound
from ldm_vae.training.objective import Objective

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(out)
    return out


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_on_digits(tmp_path_factory.mktemp("runs") / "textbook", digits)


@pytest.fixture(scope="module")
def codec(run: Path) -> BitsBack:
    return BitsBack(*load_likelihood(str(run)))


@pytest.fixture(scope="module")
def images(digits: Path, codec: BitsBack) -> list[torch.Tensor]:
    return read_images(find_images([digits / "heldout"])[:6], codec)


@pytest.fixture(scope="module")
def small(codec: BitsBack, images: list[torch.Tensor]) -> bytes:
    """A file of 6 digits."""
    return write(codec, [f"{number}" for number in range(len(images))], images)


def pixels_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).tobytes() for path in folder.rglob("*.png")
    }


def test_digits_come_back_to_the_bit_in_the_bits_of_the_bound(
    digits: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = digits / "heldout", tmp_path / "digits.lvc"
    call("compress", given, out, "--vae", run)
    said = capsys.readouterr().out
    call("decompress", out, tmp_path / "back", "--vae", run)
    assert len(pixels_of(given)) == 360 and pixels_of(tmp_path / "back") == pixels_of(given)
    parts = parts_of(out.read_bytes())
    assert sum(parts.values()) == out.stat().st_size and parts["seed"] <= 40
    assert f"images {parts['images']:,}, which are {8 * parts['images'] / 23040:.4f} bits per value" in said
    batches = image_batches(open_source(given, channels=1), None, 8, batch_size=64)
    bound = evidence_bound(*load_likelihood(str(run)), batches, CPU)
    logged = [line["validation/elbo_bits_per_dimension"] for line in metrics(run) if "validation/psnr" in line]
    assert bound["elbo_bits_per_dimension"] == pytest.approx(logged[-1], rel=1e-6)  # by the averaged variance, too
    assert 8 * parts["images"] / (360 * 64) == pytest.approx(logged[-1], rel=0.02)


def with_two_threads() -> None:
    torch.set_num_threads(2)
    cli.main()


def test_another_process_with_other_threads_decodes_it(
    run: Path, images: list[torch.Tensor], small: bytes, tmp_path: Path
) -> None:
    (tmp_path / "small.lvc").write_bytes(small)
    done = fork(with_two_threads, ["decompress", f"{tmp_path}/small.lvc", f"{tmp_path}/back", "--vae", str(run)]).wait()
    assert done.returncode == 0, done.stderr
    assert pixels_of(tmp_path / "back") == {f"{n}.png": image.numpy().tobytes() for n, image in enumerate(images)}


def test_threads_are_pinned_and_left_as_they_were(
    codec: BitsBack, images: list[torch.Tensor], small: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode = codec.encode
    monkeypatch.setattr(codec, "encode", lambda given: (seen.append(torch.get_num_threads()), encode(given))[1])
    torch.set_num_threads(2)
    try:
        again = write(codec, [f"{number}" for number in range(len(images))], images)
        assert torch.get_num_threads() == 2 and seen == [1] and again == small
    finally:
        torch.set_num_threads(1)


def test_sizes_that_do_not_divide_and_several_tables_of_rows(
    codec: BitsBack, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits_back, "ROWS", 7)
    row = torch.cat(read_images(find_images([digits / "heldout"])[:3], codec), dim=2)
    given = [row[:, :, :11], row[:, :3, :5], row[:, :1, :1], row]
    content = write(codec, ["a", "b", "c", "d"], given)
    found = decode(codec, *read(content, "FILE"), "FILE")
    assert [one.shape for one in found] == [one.shape for one in given]
    assert all(torch.equal(one, other) for one, other in zip(found, given, strict=True))


def test_colour_of_256_levels_and_several_latent_positions(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    objective = Objective({"gaussian_nll": GaussianNLLConfig(logvar=-1.0, levels=256), "kl": KL()}).requires_grad_(
        False
    )
    codec = BitsBack(tiny_vae.requires_grad_(False), objective)
    write_images(tmp_path, 2, size=(9, 14))
    given = read_images(find_images([tmp_path]), codec)
    content = write(codec, ["a", "b"], given)
    assert all(
        torch.equal(one, other) for one, other in zip(decode(codec, *read(content, "FILE"), "FILE"), given, strict=True)
    )
    assert parts_of(content)["images"] < 1.2 * 2 * 9 * 14 * 3  # of a network that knows nothing, about 8 bits a value


def test_a_stack_that_runs_dry_begins_anew_with_more(
    codec: BitsBack, images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert codec._stack(images, [12] * 6, 12) is not None and codec._stack(images, [12, 99, 12, 12, 12, 12], 12) is None
    seeds, stack = [], codec._stack

    def dry_at_first(some: list[torch.Tensor], needs: list[int], seed: int) -> entropy_coder.Words | None:
        seeds.append(seed)
        return None if len(seeds) == 1 else stack(some, needs, seed)

    monkeypatch.setattr(codec, "_stack", dry_at_first)
    code = codec.encode(images)
    assert code.seed == seeds[1] == 2 * seeds[0] and code.kept >= seeds[0]
    found = codec.decode(code, [(8, 8)] * 6)
    assert all(torch.equal(one, other) for one, other in zip(found, images, strict=True))


def test_masses_of_levels_are_the_likelihood_and_sum_to_one() -> None:
    term, pixels = GaussianNLL(-2.0, learned=False, levels=17), torch.linspace(-1.4, 1.4, 9)
    masses = term.masses(pixels)
    assert masses.shape == (9, 17) and torch.allclose(masses.sum(dim=1), torch.ones(9, dtype=torch.float64), atol=1e-12)
    for level in (0, 5, 16):
        target = torch.full((1,), -1 + level / 8)
        nats = [term(pixel[None], target).item() for pixel in pixels]
        assert torch.allclose(-masses[:, level].log(), torch.tensor(nats, dtype=torch.float64), rtol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_networks_without_such_a_likelihood_are_refused(
    run: Path, tiny_vae_folder: Path, digits: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.lvc"
    with refused(UsageError, "checkpoints"):
        call("compress", digits / "heldout", out, "--vae", tiny_vae_folder)
    dense = train_on_digits(tmp_path / "dense", digits, 64, "--losses.gaussian_nll.levels", "null")
    with refused(UsageError, "losses.gaussian_nll.levels"):
        call("compress", digits / "heldout", out, "--vae", dense)
    with refused(UsageError, "vae"):
        BitsBack(network(codes=True).vae, load_likelihood(str(run))[1])
    assert not out.exists()


def test_images_whose_values_would_not_come_back_are_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.lvc"
    Image.new("L", (8, 8), 100).save(tmp_path / "between.png")
    write_images(tmp_path / "colour", 1, size=(8, 8))
    (tmp_path / "broken.png").write_bytes(b"no")
    for name, word in (
        ("between.png", "levels"),
        ("colour", "lossless"),
        ("broken.png", "IMAGE"),
        ("none.png", "IMAGE"),
    ):
        with refused(UsageError, word):
            call("compress", tmp_path / name, out, "--vae", run)
    out.write_bytes(b"here")
    with refused(UsageError, "OUT"):  # a user who forgot OUT names the last image
        call("compress", tmp_path / "between.png", out, "--vae", run)
    assert out.read_bytes() == b"here"


def test_another_network_is_told_from_the_one_that_made_it(
    run: Path, digits: Path, small: bytes, tmp_path: Path
) -> None:
    other = train_on_digits(tmp_path / "other", digits, 64)
    (tmp_path / "small.lvc").write_bytes(small)
    with refused(UsageError, "VAE"):
        call("decompress", tmp_path / "small.lvc", tmp_path / "back", "--vae", other)
    vae, objective = load_likelihood(str(run))
    objective.terms["gaussian_nll"].logvar += 1e-3
    with refused(UsageError, "likelihood"):
        decode(BitsBack(vae, objective), *read(small, "FILE"), "FILE")
    assert not (tmp_path / "back").exists()


def test_another_machine_is_said_and_what_it_rounds_otherwise_is_no_image(
    codec: BitsBack, small: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"torch": "2.0", "cpu": "x86_64 AVX", "constriction": entropy_coder.environment()["constriction"]}
    moved = with_header(small, environment=there)
    assert len(decode(codec, *read(moved, "FILE"), "FILE")) == 6  # the same bits, by luck
    assert "note: FILE: was made with torch 2.0 (here " in capsys.readouterr().err
    masses = codec.likelihood.masses
    monkeypatch.setattr(codec.likelihood, "masses", lambda decoded: masses(decoded + 1e-6))
    with pytest.raises(WorkError, match=r"FILE: what comes out .*: it was made with torch 2.0"):
        decode(codec, *read(moved, "FILE"), "FILE")
    with refused(WorkError, "FILE"):
        decode(codec, *read(small, "FILE"), "FILE")


def test_a_machine_without_constriction_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with refused(WorkError, "constriction"):
        entropy_coder.coders()
    assert doctor.EXTRAS["compress"][0] == "constriction"


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_damaged_byte_and_every_truncation_is_one_sentence(small: bytes, tmp_path: Path) -> None:
    assert len(small) < 2000
    for place in range(len(small)):
        damaged = bytearray(small)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(UsageError, match=r"FILE: (is damaged|is no file of)"):
            read(bytes(damaged), "FILE")
        with pytest.raises(UsageError, match=r"FILE: (is damaged|is empty|is no file of)"):
            read(small[:place], "FILE")
    with pytest.raises(UsageError, match="damaged"):
        read(small + b"x", "FILE")
    for name, content in {"empty": b"", "picture": b"\x89PNG\r\n\x1a\n" + bytes(99), "page": b"<html>"}.items():
        (tmp_path / name).write_bytes(content)
        with refused(UsageError, "FILE"):
            call("decompress", tmp_path / name, tmp_path / "back", "--vae", "nothing")
    with refused(UsageError, "FILE"):
        call("decompress", tmp_path / "none", tmp_path / "back", "--vae", "nothing")
    newer = summed(FIXED.pack(MAGIC, 2, 0) + bytes(DIGEST))
    with refused(UsageError, "version"):
        read(newer, "FILE")


def test_bytes_changed_with_their_checksum_are_one_sentence_or_the_same_images(codec: BitsBack, small: bytes) -> None:
    """Somebody means harm: nothing but a sentence, and never another image."""
    for place in range(0, len(small) - DIGEST, 5):
        damaged = bytearray(small)
        damaged[place] ^= 1 << place % 8
        with pytest.raises((UsageError, WorkError)) as error:
            decode(codec, *read(summed(bytes(damaged)), "FILE"), "FILE")
        assert "\n" not in str(error.value), place


@pytest.mark.parametrize(
    "changes",
    [
        {"names": [f"{n}" for n in range(5)]},
        {"names": []},
        {"names": ["../a", *"bcdef"]},
        {"names": ["/etc/a", *"bcdef"]},
        {"names": ["a/./b", *"bcdef"]},
        {"names": ["a\\..\\b", *"bcdef"]},
        {"names": ["C:a", *"bcdef"]},
        {"names": ["a\x1b[2J", *"bcdef"]},
        {"names": ["ä" * 111, *"bcdef"]},
        {"names": ["a\ud800", *"bcdef"]},
        {"names": ["a", *"abcde"]},
        {"names": ["a", "a.png/b", *"cdef"]},
        {"sizes": [[8, 8]] * 5},
        {"sizes": [[8, 0]] * 6},
        {"sizes": [[8, 2**16]] * 6},
        {"sizes": [[8, 16]] * 6},
        {"words": -1},
        {"kept": 999},
        {"seed": 2**40},
        {"kind": "other"},
        {"kind": "indices"},
        {"networks": ["a", "b", "c"]},
        {"content": "0" * 64},
        {"more": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_header_that_cannot_be_is_one_sentence(codec: BitsBack, small: bytes, changes: dict[str, object]) -> None:
    kind = WorkError if "content" in changes or changes.get("sizes") == [[8, 16]] * 6 else UsageError
    with refused(kind, "FILE"):
        decode(codec, *read(with_header(small, **changes), "FILE"), "FILE")


def test_a_header_of_more_words_than_there_are_is_one_sentence(codec: BitsBack, small: bytes) -> None:
    # how many there are depends on the last bits of a processor's floats
    with pytest.raises(UsageError, match=r"^FILE: expected 1,000,000,000 words behind the header, got \d+ bytes$"):
        decode(codec, *read(with_header(small, words=10**9), "FILE"), "FILE")


def test_a_header_that_unpacks_to_gigabytes_is_not_unpacked(small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "SMALL", 100)
    with refused(UsageError, "header"):
        read(small, "FILE")


def test_what_a_header_says_is_what_was_given(small: bytes, images: list[torch.Tensor]) -> None:
    header, code = read(small, "FILE")
    assert isinstance(header, Header) and header.names == tuple("012345") and header.sizes == ((8, 8),) * 6
    assert header.environment["torch"] == torch.__version__ and len(code.words) == header.words
    assert code.content == entropy_coder.content_of(images)
