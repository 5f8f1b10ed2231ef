"""The plan of a ToL: bytes and times computed by hand, and its page."""

import json
import random
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlm_train.checkpoint.hf.folder import write_folder
from mlm_train.config import ModelConfig, load_config
from mlm_train.model.logical import named_pieces
from mlm_train.model.transformer import Transformer
from mlm_train.plan import tol
from mlm_train.plan.command import _giga
from mlm_train.plan.tol import Serving, StoredAs, Tier
from mlm_train.utils.units import in_units
from tests.commands import ROOT, mlm_train, refused

PAPER = ROOT / "configs" / "paper" / "memory-1b.yaml"
GIVEN = ("--build-tflops", "0.25")  # instead of measuring


@pytest.fixture(scope="module")
def paper() -> ModelConfig:
    """The 1B of arXiv 2602.00398: 128256 tokens, 24 layers, hidden 2048, intermediate 5464."""
    return load_config(PAPER).model


def small(**fields: object) -> ModelConfig:
    given = {"kind": "memory", "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2}
    return ModelConfig.model_validate(
        given | {"num_attention_heads": 4, "intermediate_size": 100, "tie_word_embeddings": True} | fields
    )


def serving(*, flops: float = 1e30, distinct: float = 1.0, **tiers: Tier) -> Serving:
    """Tiers without limits unless given."""
    names = (tol.VRAM, tol.RAM, tol.NVME)
    found = [tiers.get(name.lower(), Tier(name, 1e30, 1e30)) for name in names]
    return Serving((found[0], found[1], found[2]), flops, distinct, "bfloat16")


def test_bytes_of_the_papers_1b(paper: ModelConfig) -> None:
    """12.6 GB in 16 bits: 128256 x 24 x 2048 x 2."""
    assert tol.tol_bytes(paper, StoredAs("bfloat16")) == 12_608_077_824
    # 2048 codes of one byte and 32 scales of two: 2112 per layer; 1024 and 64: 1088.
    assert tol.row_bytes(paper, StoredAs("int8")) == 24 * 2112 == 50_688
    assert tol.tol_bytes(paper, StoredAs("int8")) == 6_501_040_128
    assert tol.row_bytes(paper, StoredAs("int4")) == 24 * 1088 == 26_112
    assert tol.tol_bytes(paper, StoredAs("int4")) == 3_349_020_672
    # 256 values of two bytes per layer; bases of 256 x 2048 float16 in 24 layers.
    assert tol.row_bytes(paper, StoredAs("bfloat16", 256)) == 24 * 512
    assert tol.tol_bytes(paper, StoredAs("bfloat16", 256)) == 128_256 * 12_288 + 25_165_824
    # 24 layers of 3 x 2048 x 5464 and a norm of 2048, in two bytes.
    assert tol.ffn_m_bytes(paper, "bfloat16") == 1_611_497_472
    # Attention 4 x 2048^2 and its norm in each layer, a last norm, embedding and head of 128256 x 2048.
    others = 24 * (16_777_216 + 2048) + 2048 + 2 * 262_668_288
    assert tol.other_bytes(paper, "bfloat16") == 2 * others
    # A step reads the whole head but only a few rows of the embedding; if they are tied, all of it.
    assert tol.read_bytes(paper, "bfloat16") == 2 * (others - 262_668_288)
    tied = paper.model_copy(update={"tie_word_embeddings": True})
    assert tol.read_bytes(tied, "bfloat16") == tol.other_bytes(tied, "bfloat16") == 2 * (others - 262_668_288)


def test_short_groups_and_padding() -> None:
    """100 values are two groups: 4 bytes of scales. A packed layer is padded to a multiple of 16 bytes."""
    model = small(hidden_size=100, num_attention_heads=5)
    assert tol.row_bytes(model, StoredAs("bfloat16")) == 2 * 200
    assert tol.row_bytes(model, StoredAs("int8")) == 2 * 112  # 104
    assert tol.row_bytes(model, StoredAs("int4")) == 2 * 64  # 54
    assert tol.row_bytes(model, StoredAs("bfloat16", 7)) == 2 * 16  # 14
    assert tol.row_bytes(model, StoredAs("int4", 7)) == 2 * 16  # 2 + 4: half a byte is a byte
    assert tol.basis_bytes(model, StoredAs("int4", 7)) == 2 * 7 * 100 * 2


def test_build_time(paper: ModelConfig) -> None:
    """6 x 24 x 2048 x 5464 FLOPs per token: 2.067e14 for the vocabulary, at 1e12 per second; bytes at 2e9."""
    compute, write = tol.build_seconds(paper, StoredAs("bfloat16"), 1e12, 2e9)
    assert compute == pytest.approx(206.671611691)
    assert write == pytest.approx(6.304038912)


def test_the_batch_from_which_reading_rows_takes_longer(paper: ModelConfig) -> None:
    """1.611497472 ms of weights from VRAM at 1e12; 98304 bytes from RAM at 1e10 are 9.8304 us: 163.9 rows."""
    machine = serving(vram=Tier(tol.VRAM, 24e9, 1e12), ram=Tier(tol.RAM, 64e9, 1e10))
    vram, ram, _ = tol.compare(paper, machine, machine.tiers[0], [StoredAs("bfloat16")], [1, 100, 1000])
    assert vram.fits and ram.fits and ram.bytes == 12_608_077_824
    assert ram.seconds == pytest.approx([9.8304e-6, 9.8304e-4, 9.8304e-3])
    assert ram.pays == [(1, 164)]
    assert vram.pays == [(1, 16393)]  # 98304 bytes at 1e12: 16392.995 rows
    # With half of the tokens distinct, twice the batch.
    halved = machine._replace(distinct=0.5)
    assert tol.compare(paper, halved, machine.tiers[0], [StoredAs("bfloat16")], [1])[1].pays == [(1, 328)]
    # If matmuls are slower than reading a row, it pays at any batch size: 16.1 us against 9.83.
    slow = machine._replace(flops=1e14)
    assert tol.compare(paper, slow, machine.tiers[0], [StoredAs("bfloat16")], [1])[1].pays == [(1, None)]


def test_latency_makes_small_batches_not_pay() -> None:
    """Weights in 10 us, matmuls 1 us per row, reads at least 50 us: equal at 50 rows, it pays from 51 on."""
    model = small()  # 38528 parameters of FFN-M, 76800 FLOPs per token, a row of 256 bytes: one block
    vram = Tier(tol.VRAM, 1e9, 77_056 / 10e-6)
    nvme = Tier(tol.NVME, 1e9, 4096 / 0.1e-6, latency=50e-6, in_flight=1e9, block=4096)
    machine = serving(vram=vram, nvme=nvme, flops=76_800 / 1e-6)
    offer = tol.compare(model, machine, vram, [StoredAs("bfloat16")], [1, 1000])[2]
    assert offer.seconds == pytest.approx([50e-6, 100e-6])
    assert [first for first, _ in offer.pays] in ([50], [51]) and offer.pays[0][1] is None
    never = nvme._replace(bandwidth=4096 / 2e-6)
    machine = serving(vram=vram, nvme=never, flops=76_800 / 1e-6)
    assert tol.compare(model, machine, vram, [StoredAs("bfloat16")], [1])[2].pays == []


def test_against_a_reference_of_one_batch_at_a_time() -> None:
    chance = random.Random()
    for _ in range(30):
        model = small(hidden_size=16 * chance.randint(1, 9), num_hidden_layers=chance.randint(1, 4))
        hidden, layers, keys = model.hidden_size, model.num_hidden_layers, model.intermediate_size

        def power(low: float, high: float) -> float:
            return 10 ** chance.uniform(low, high)

        vram, ram = Tier(tol.VRAM, 1e9, power(9, 12)), Tier(tol.RAM, 1e9, power(8, 11))
        nvme = Tier(tol.NVME, 1e9, power(7, 10), power(-6, -3), power(0, 2), 4096)
        machine = serving(vram=vram, ram=ram, nvme=nvme, flops=power(9, 13), distinct=chance.uniform(0.1, 1))
        home, rank = chance.choice(machine.tiers), chance.randint(1, hidden)
        kinds = [StoredAs("bfloat16"), StoredAs("int8"), StoredAs("int4", rank)]
        widths = [2 * hidden, ceil(hidden / 64) * 2 + hidden, ceil(rank / 64) * 2 + ceil(rank / 2)]
        sizes = [layers * 2 * hidden, *(layers * ceil(width / 16) * 16 for width in widths[1:])]
        batches, tiers = list(range(1, 60)), {tier.name: tier for tier in machine.tiers}
        for offer in tol.compare(model, machine, home, kinds, batches):
            size, tier = (
                sizes[kinds.index(offer.stored)],
                tiers[offer.tier],
            )
            for batch, found in zip(batches, offer.seconds, strict=True):
                rows = max(1.0, batch * machine.distinct)
                weights = layers * (3 * hidden * keys + hidden) * 2 / home.bandwidth
                computed = max(weights, rows * 6 * layers * hidden * keys / machine.flops)
                read = max(
                    rows * ceil(size / tier.block) * tier.block / tier.bandwidth,
                    max(1.0, rows / tier.in_flight) * tier.latency,
                )
                if offer.stored.rank is not None:
                    elements = layers * rank * hidden
                    read += max(2 * elements / vram.bandwidth, 2 * rows * elements / machine.flops)
                assert found == pytest.approx(read, rel=1e-12)
                inside = any(first <= batch < (stop or 1e9) for first, stop in offer.pays)
                assert inside == (read < computed) or read == pytest.approx(computed, rel=1e-12)


def test_capacity(paper: ModelConfig) -> None:
    """VRAM first holds the other weights (1.86 GB); FFN-M's weights (1.61 GB) go where they fit."""
    machine = serving(vram=Tier(tol.VRAM, 14.4e9, 1e12), ram=Tier(tol.RAM, 12.7e9, 1e10))
    kinds = [StoredAs("bfloat16"), StoredAs("int8")]
    offers = tol.compare(paper, machine, machine.tiers[0], kinds, [1])
    assert [offer.fits for offer in offers] == [False, True, True, True, True, True]
    assert offers[0].pays == []
    assert tol.home_of_weights(paper, machine) == machine.tiers[0]
    less = serving(vram=Tier(tol.VRAM, 3.4e9, 1e12), ram=Tier(tol.RAM, 2e9, 1e10))
    assert tol.home_of_weights(paper, less) == less.tiers[1]
    none = Serving(tuple(tier._replace(capacity=1e9) for tier in less.tiers), 1e14, 1.0, "bfloat16")  # type: ignore[arg-type]
    assert tol.home_of_weights(paper, none) is None


def planned(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    mlm_train("plan", "tol", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_json_and_page_agree(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, PAPER, *GIVEN)
    assert [table["bytes"] for table in plan["tables"]] == [12_608_077_824, 6_501_040_128, 3_349_020_672]
    assert plan["ffn_m"]["bytes"] == 1_611_497_472 and plan["ffn_m"]["tier"] == "VRAM"
    assert plan["ffn_m"]["seconds"] == pytest.approx([1.611497472e-3] * 3)
    offers = {(offer["stored"], offer["tier"]): offer for offer in plan["serving"]}
    # 24 blocks of 4096 at 5e9: 19.66 us per row against 1.611 ms, then against 16.1 us per row of matmuls.
    assert offers["bfloat16", "NVMe"]["pays"] == [[1, 82]]
    assert offers["bfloat16", "RAM"]["seconds"] == pytest.approx([98304 / 25e9 * b for b in (1, 8, 64)])
    mlm_train("plan", "tol", PAPER, *GIVEN)
    page = capsys.readouterr().out
    for text in (
        "12.61 GB", "7.82", "1.61 ms", "98.3 ns*", "252 us*",
        "bfloat16 ToL in NVMe: it pays only at batch 1 to 81, not at batch 82 and up",
        "none of these, all are larger", "--ram-gbs 25", "--nvme-latency-us 100", "Formulae",
        "--build-tflops 0.25: as given", "saves at most 55% at batch 1.",
    ):  # fmt: skip
        assert text in page, text
    assert all(f"--{option}" in page for option in plan["assumed"])


def test_page_where_nothing_pays_or_fits(capsys: pytest.CaptureFixture[str]) -> None:
    late = ("--nvme-latency-us", 5000, "--nvme-reads", 10**6)
    mlm_train("plan", "tol", PAPER, *GIVEN, "--vram-gb", 4, "--ram-gb", 10, *late)
    page = capsys.readouterr().out
    assert "bfloat16 ToL in VRAM: it does not fit (12.61 GB)" in page
    assert "bfloat16 ToL in RAM: it does not fit (12.61 GB)" in page
    # 5 ms of latency against 16.1139917 us of matmuls per row: 310.3 rows.
    assert "int4 ToL in NVMe: it pays only at batch 311 and up\n" in page
    mlm_train("plan", "tol", PAPER, *GIVEN, "--nvme-gbs", 0.01, "--nvme-latency-us", 5000, "--tflops", 1000)
    assert "bfloat16 ToL in NVMe: at no batch size" in capsys.readouterr().out


def test_weights_in_another_tier(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, PAPER, *GIVEN, "--vram-gb", 3, "--weights-dtype", "int8")
    # 8.25 bits: others 0.958 GB, FFN-M 0.831 GB in VRAM still.
    assert plan["ffn_m"]["tier"] == "VRAM" and plan["ffn_m"]["bytes"] == 830_928_384
    plan = planned(capsys, PAPER, *GIVEN, "--weights-in", "ram")
    assert plan["ffn_m"]["tier"] == "RAM"
    assert plan["ffn_m"]["seconds"][0] == pytest.approx(1_611_497_472 / 25e9)


def test_a_folder_as_the_model_and_measured_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(random.randrange(2**31))
    model = Transformer(small())
    write_folder(tmp_path / "export", model.config, named_pieces(model))
    plan = planned(capsys, tmp_path / "export", "--batch", 3, "--rank", 5)
    assert plan["tables"][0]["bytes"] == 1000 * 2 * 64 * 2 and len(plan["tables"]) == 6
    assert plan["build_tflops"]["measured"] and plan["build_tflops"]["value"] > 0
    assert "is not a config" in refused("plan", "tol", tmp_path / "export", "model.vocab_size=3")


def test_overrides_change_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, PAPER, "model.vocab_size=1000", *GIVEN)
    assert plan["tables"][0]["bytes"] == 1000 * 24 * 2048 * 2


def test_small_figures_have_units_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of 1000 x 2 x 32 values: 128 kB."""
    tiny = ("model.vocab_size=1000", "model.hidden_size=32", "model.num_hidden_layers=2")
    shape = ("model.num_attention_heads=4", "model.intermediate_size=64")
    mlm_train("plan", "tol", PAPER, *tiny, *shape, *GIVEN)
    page = capsys.readouterr().out
    assert "128.00 kB" in page and " ns*" in page and "0.000" not in page
    assert [in_units(size) for size in (0, 1, 2, 1000)] == ["0 bytes", "1 byte", "2 bytes", "1.00 kB"]


@pytest.mark.parametrize("size", [1, 999, 1_234_567, 1_001_000_000, 9_994_000_000, 123_456_789_012])
def test_the_size_that_a_message_asks_for_is_enough(size: int) -> None:
    assert size <= float(_giga(size)) * 1e9 <= 1.011 * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROOT / "configs" / "paper" / "base-1b.yaml",), "is a base model"),
        (("nowhere.yaml",), "nowhere.yaml does not exist"),
        ((ROOT / "docs",), "holds no model"),
        ((PAPER, "--batch", 0), "--batch 0"),
        ((PAPER, "--rank", 2049), "--rank 2049"),
        (
            (PAPER, "--vram-gb", 1),
            "weights other than FFN-M take 1.86 GB; give at least 1.86",
        ),
        ((PAPER, "model.vocab_size="), "model.vocab_size has no value: input should be a valid integer"),
        ((PAPER, "--ram-gbs", 0), "--ram-gbs 0"),
        ((PAPER, "--write-gbs", "inf"), "--write-gbs inf"),
        ((PAPER, "--distinct", 2), "--distinct 2"),
        ((PAPER, "--build-tflops", "nan"), "--build-tflops nan"),
        ((PAPER, "--vram-gb", 3, "--weights-in", "vram"), "give --vram-gb 3.47 or more"),
        ((PAPER, "--vram-gb", 2, "--ram-gb", 1, "--nvme-gb", 1), "give --nvme-gb 1.62 or more"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[object, ...], message: str) -> None:
    assert message in refused("plan", "tol", *arguments)
