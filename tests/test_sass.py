"""Counting a main loop in disassembled code, on a listing small enough to count by hand."""

import pytest

from benchmarks import sass

LISTING = """
	.text.kernel:
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R6], desc[UR4][R8.64] ;
        /*0030*/              @!P1 LDGSTS.E.BYPASS.128 [R6+0x800], desc[UR4][R8.64+0x10] ;
        /*0040*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0050*/                   LDG.E.U16 R3, desc[UR4][R4.64] ;
        /*0060*/                   HMMA.16816.F32.BF16 R12, R4, R8, R12 ;
        /*0070*/                   NOP ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*00a0*/                   LDG.E.64 R2, desc[UR4][R4.64] ;
        /*00b0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00c0*/              @!P2 BRA `(.L_x_2) ;
        /*00d0*/               @P3 BRA `(.L_x_0) ;
        /*00e0*/                   EXIT ;
.L_x_3:
        /*00f0*/                   BRA `(.L_x_3) ;
"""


def test_the_loop_with_the_widest_traffic_is_the_main_one():
    assert len(sass.loops(LISTING)) == 2  # innermost ones; the padding's branch to itself is none
    loop = sass.main_loop(LISTING)
    assert loop is not None
    assert loop.instructions == 7
    assert loop.loads == {16: 2, 4: 1, 2: 1}
    assert loop.products == {"HMMA": 1}
    assert loop.classes["BAR"] == 1
    assert loop.widest == 16
    assert loop.warp_bytes == 2 * 16 * 32


def test_operations_a_byte():
    loop = sass.main_loop(LISTING)
    assert loop is not None
    # Four warps load 4 KiB a turn: one tile of 4 KiB, or two of 2 KiB.
    assert loop.lane_operations(warps=4, tile_bytes=4096) == 7 * 32 * 4 / 4096
    assert loop.lane_operations(warps=4, tile_bytes=2048) == 7 * 32 * 4 / 4096
    # A tile of 3000 bytes whose loads are padded to 4096 is one tile.
    padded = loop.lane_operations(warps=4, tile_bytes=3000, padded_bytes=4096)
    assert padded == pytest.approx(7 * 32 * 4 / 3000)


def test_straight_code_has_no_main_loop():
    assert sass.main_loop("        /*0000*/                   EXIT ;\n") is None
