"""The cost read off machine code: known instructions, loops, pipes and seldom paths."""

from __future__ import annotations

import pytest

from snell.bench import slots

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                  /* 0x00000a00ff017b82 */
        /*0010*/                   FADD R2, R3, R4 ;                                       /* 0x00000a00ff017b82 */
        /*0020*/                   FFMA R2, R3, R4, R5 ;                                   /* 0x00000a00ff017b82 */
        /*0030*/               @P0 MUFU.RSQ R2, R3 ;                                       /* 0x00000a00ff017b82 */
        /*0040*/              @!P2 BRA 0x60 ;                                              /* 0x00000000000ca947 */
        /*0050*/              @!P0 BRA 0x20 ;                                              /* 0x00000000000ca947 */
        /*0060*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;               /* 0x00000a00ff017b82 */
        /*0070*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;                             /* 0x00000a00ff017b82 */
        /*0080*/               @P1 BRA 0x10 ;                                              /* 0x00000a00ff017b82 */
        /*0090*/                   EXIT ;                                                  /* 0x00000a00ff017b82 */
"""

GUARDED = """
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;                        /* 0x000000080c04723c */
        /*0010*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ;               /* 0x00e00000041879f0 */
        /*0020*/               @P0 BRA 0x60 ;                                              /* 0x00000a00ff017b82 */
        /*0030*/                   FADD R2, R3, R4 ;                                       /* 0x00000a00ff017b82 */
        /*0040*/               @P1 BRA 0x30 ;                                              /* 0x00000a00ff017b82 */
        /*0050*/                   FMUL R2, R2, R2 ;                                       /* 0x00000a00ff017b82 */
        /*0060*/                   MUFU.SQRT R2, R4 ;                                      /* 0x00000a00ff017b82 */
        /*0070*/                   EXIT ;                                                  /* 0x00000a00ff017b82 */
"""


def test_instructions_and_pipes_are_read():
    code = slots.instructions(SASS)
    assert [one.op for one in code] == ["LDC", "FADD", "FFMA", "MUFU", "BRA", "BRA", "LDG", "UIADD3", "BRA", "EXIT"]
    assert [one.target for one in code if one.op == "BRA"] == [0x60, 0x20, 0x10]
    assert [one.pipe for one in code] == (
        ["loads", "FP32", "FP32", "MUFU", "other", "other", "loads", "other", "other", "other"]
    )


def test_the_main_loop_is_the_innermost_with_the_arithmetic():
    code = slots.instructions(SASS)
    assert [one.address for one in slots.main_loop(code)] == [0x20, 0x30, 0x40, 0x50]
    straight = [one for one in code if one.op != "BRA"]
    assert slots.main_loop(straight) == straight


def test_a_branch_with_a_loop_of_its_own_is_seldom_taken():
    code = slots.instructions(GUARDED)
    assert [one.op for one in slots.main_loop(code)] == ["HMMA", "HGMMA", "BRA", "MUFU", "EXIT"]
    found = slots.slots(GUARDED, 2)
    assert found["tensor"] == 1.0
    assert found["products"] == pytest.approx((16 * 8 * 16 / 32 / slots.SYNCHRONOUS + 64 * 64 * 16 / 128) / 2)


def test_the_busiest_bounds_the_time():
    assert slots.clocks({"FP32": 64, "integer": 64, "products": 0}) == 1.0
    assert slots.clocks({"MUFU": 32, "products": 0}) == 2.0
    assert slots.clocks({"tensor": 1, "products": 6144}) == 3.0
    assert slots.clocks({"FP32": 1, "products": 0}, moved=8 * slots.BYTES) == 8.0
    assert slots.microseconds(132 * 1755, 2.0) == pytest.approx(2.0)
    assert slots.floor(4096 * 4096, 8192) == pytest.approx(1044, rel=1e-3)


def test_blocks_are_bounded_by_registers_warps_and_shared_memory():
    assert slots.resident(90, registers=60, shared=0, warps=8) == 4
    assert slots.resident(90, registers=32, shared=0, warps=1) == 32
    assert slots.resident(90, registers=32, shared=0, warps=16) == 4
    assert slots.resident(80, registers=32, shared=80 * 1024, warps=4) == 2
