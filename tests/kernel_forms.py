"""The forms of the C kernels that this machine can run: what the compiler is told beside the kernels' own flags."""

import platform
from pathlib import Path

from core.c_build import processor_flags

AMX_EMULATION = Path(__file__).with_name("amx_emulation.h")
_V2 = {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"}
_V3 = _V2 | {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# name → what the processor needs, and flags of the compiler
_X86_64 = {
    "x86-64-v2": (_V2, ["-march=x86-64-v2"]),
    "x86-64-v3": (_V3, ["-march=x86-64-v3"]),
    "x86-64-v4": (_V4, ["-march=x86-64-v4"]),
    "AMX emulated": (_V4 | {"avx512_bf16"}, ["-include", str(AMX_EMULATION)]),
}
_ARM = {"armv8-a": (set[str](), ["-march=armv8-a"])}


def forms() -> dict[str, list[str]]:
    """Name → flags, `native` first."""
    others = {"x86_64": _X86_64, "aarch64": _ARM}.get(platform.machine(), {})
    has = set(processor_flags().split())
    return {"native": [], **{name: flags for name, (needed, flags) in others.items() if needed <= has}}
