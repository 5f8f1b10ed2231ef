"""Ratios of `bench decode`, from its rows."""

from typing import Any

from mlm_train.bench.decode_models import KINDS, active_bytes

_BATCH1 = "decode.batch1."


def ratios_of(rows: dict[str, dict[str, Any]], shape: str) -> dict[str, float]:
    """Name -> ratio; of times at batch 1 where the name does not say otherwise."""
    time = {name: row["median"] for name, row in rows.items()}

    def over(name: str, other: str, prefix: str = _BATCH1) -> float:
        return float(time[prefix + name] / time[prefix + other])

    table = "memory.bfloat16"
    found = {
        "memory_over_base_time": over(table, "base"),
        "flex3_over_base_time": over("flex3", "base"),
        "flex2_over_base_time": over("flex2", "base"),
        "flex1_over_base_time": over("flex1", "base"),
        "disk_over_ram_time": over("memory.disk", table),
        "disk_over_ram_p95": rows[f"{_BATCH1}memory.disk"]["p95"] / rows[_BATCH1 + table]["p95"],
        "int4_over_16bit_time": over("memory.int4", table),
        "memory_over_base_resident": over("memory", "base", "resident."),
    }
    for prefix in sorted({name.rpartition("base")[0] for name in rows if name.endswith(".base")}):
        if prefix not in (_BATCH1, "resident.", f"{_BATCH1}weights."):
            found[f"{prefix}memory_over_base"] = over(table, "base", prefix)
            found[f"{prefix}disk_over_ram"] = over("memory.disk", table, prefix)
    hf = [name for name in time if name.startswith(f"{_BATCH1}hf.")]
    if hf:
        found["base_over_hf_time"] = time[f"{_BATCH1}base"] / min(time[name] for name in hf)
    # The bandwidth of the fastest products, of the kind that has most of them.
    limit = {
        kind: time[f"{_BATCH1}weights.base"] * active_bytes(shape, kind) / active_bytes(shape, "base")
        for kind in KINDS
    }
    names = {kind: table if kind == "memory" else kind for kind in KINDS}
    over_limit = {kind: time[_BATCH1 + name] / limit[kind] for kind, name in names.items()}
    found |= {f"{kind}_over_bytes_limit": value for kind, value in over_limit.items()}
    return found | {"worst_over_bytes_limit": max(over_limit.values())}
