"""Numbers of tensor types that are not read: whose they are, and what to do.

The numbers are those of ggml's header (ggml-org/llama.cpp ggml/include/ggml.h) and of its fork
ikawrakow/ik_llama.cpp, which took 97 and up, and numbers that ggml had given up.
"""

from __future__ import annotations

from collections.abc import Mapping

from requant.kernels.gguf import TYPES

_REMOVED: Mapping[int, str] = {
    **{4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"},
    **{36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"},
}
_INTERNAL: Mapping[int, str] = {9: "Q8_1", 15: "Q8_K"}
_NEWER: Mapping[int, str] = {42: "Q2_0"}
_FORK = "ik_llama.cpp"
_OF_FORK_LINES = """
    97:Q8_0_X4 98:Q8_1_X4 99:Q8_2_X4 133:Q6_0 134:IQ1_BN 135:IQ2_BN 136:Q8_K64 137:IQ2_K
    138:IQ3_K 139:IQ4_K 140:IQ5_K 141:IQ6_K 144:IQ4_KS 145:IQ2_KS 146:IQ4_KSS 147:Q8_K16
    148:Q8_K32 149:Q8_KR8 150:Q8_K128 151:Q8_KV 152:IQ5_KS 153:IQ2_KT 154:IQ3_KT 155:IQ4_KT
    156:IQ3_KS 157:IQ2_KL 158:IQ1_KT 202:Q4_0_R8 206:Q5_0_R4 208:Q8_0_R8 210:Q2_K_R4
    211:Q3_K_R4 212:Q4_K_R4 213:Q5_K_R4 214:Q6_K_R4 216:IQ2_XXS_R4 217:IQ2_XS_R4
    218:IQ3_XXS_R4 219:IQ1_S_R4 220:IQ4_NL_R4 221:IQ3_S_R4 222:IQ2_S_R4 223:IQ4_XS_R8
    229:IQ1_M_R4 230:BF16_R16 233:Q6_0_R4 335:IQ2_BN_R4 337:IQ2_K_R4 338:IQ3_K_R4 339:IQ4_K_R4
    340:IQ5_K_R4 344:IQ4_KS_R4 352:IQ5_KS_R4 398:Q8_KV_R8 399:Q8_K_R8
"""
_OF_FORK = {int(n): name for n, name in (x.split(":") for x in _OF_FORK_LINES.split())}
_OTHER_FILE = "take a file of the model in another type, as Q4_K_M or Q8_0"


def unsupported_type(number: int) -> str:
    """Describe a type that is not read, in words that follow "is stored as "."""
    if number in _REMOVED:
        both = " (in ik_llama.cpp I2_S)" if number == 36 else ""
        return (
            f"type {number}: {_REMOVED[number]}{both}, removed from llama.cpp, which repacks rows "
            f"while it loads them; {_OTHER_FILE}, or quantize it again from the original"
        )
    if number in _INTERNAL:
        return (
            f"type {number}: {_INTERNAL[number]}, which llama.cpp keeps for products in memory and "
            f"never stores: the file is damaged, or of another program; {_OTHER_FILE}"
        )
    if number in _OF_FORK:
        return (
            f"type {number}: {_OF_FORK[number]} of the fork {_FORK}, which only that can read; "
            f"{_OTHER_FILE}, or dequantize it there: "
            f"llama-quantize --allow-requantize IN.gguf OUT.gguf BF16"
        )
    known = ", ".join(kind.name for kind in TYPES.values())
    if number in _NEWER:
        return f"type {number}: {_NEWER[number]} of llama.cpp, not read here yet; known are {known}"
    return (
        f"type {number}, which llama.cpp does not have: it is of another program, of a newer "
        f"version, or the file is damaged; {_OTHER_FILE}. Known are {known}"
    )
