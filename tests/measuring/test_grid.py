"""The rows of the grid, and what each computes and reads, by hand."""

from __future__ import annotations

import pytest

from gatewright.errors import UserError
from gatewright.measuring import GRID, QUICK, BenchRun, Shape, grid
from gatewright.measuring.roofline import measure_machine, roofline_seconds
from tests.measuring.samples import MACHINE, TINY


def test_the_grid_has_the_rows_that_are_compared():
    asked = [
        (2048, 512, 1024, 8, 2),
        (2048, 512, 128, 64, 8),
        (4096, 256, 512, 64, 1),
        (4096, 128, 256, 16, 2),
    ]
    asked += [(4096, 64, 128, 64, 1), (16384, 128, 256, 64, 2), (16384, 128, 256, 8, 2)]
    assert set(asked) <= set(GRID)
    assert len(set(GRID)) == len(GRID)
    for width, expert_width in ((128, 256), (64, 128), (256, 512)):
        family = [row for row in GRID if row[1:3] == (width, expert_width) and row.tokens == 16384]
        assert [row.num_experts for row in family] == [8, 64, 256]
        assert all(row.tokens * row.num_selected / row.num_experts >= 128 for row in family)
        assert [grid.fewest(row, GRID) for row in family] == [None, family[0], family[0]]


def test_the_dense_side_has_the_sparse_side_s_flops():
    # Three matmuls of D x F per expert, K of them, and a router of D x E: the dense layer absorbs all of it.
    for shape in (*GRID, *QUICK):
        sparse = 3 * shape.num_selected * shape.expert_width + shape.num_experts
        assert abs(3 * grid.dense_width(shape) / sparse - 1) < 0.01, shape


def test_a_row_s_work_by_hand():
    # T 48, D 16, F 8, E 4, K 2: 96 rows of 3 matmuls of 2 x 16 x 8 = 768 FLOPs each; router 48 x 2 x 16 x 4.
    assert grid.expert_flops(TINY, "forward") == 96 * 768 == 73_728
    assert grid.expert_flops(TINY, "forward-backward") == 3 * 73_728
    assert grid.router_flops(TINY, "forward") == 6144
    assert grid.router_flops(TINY, "forward-backward") == 3 * 6144
    assert grid.weight_bytes(TINY, "fp32") == 3 * 4 * 16 * 8 * 4 == 6144
    assert grid.weight_bytes(TINY, "bf16") == 3072
    assert grid.gathered_bytes(TINY, "fp32") == 96 * 3 * 16 * 8 * 4


def test_the_roofline_by_hand():
    # 100 FLOP/s in fp32, 200 in bf16, 10 bytes/s.
    assert roofline_seconds(TINY, "fp32", "forward", MACHINE) == pytest.approx(737.28 + 61.44 + 614.4)
    both = roofline_seconds(TINY, "fp32", "forward-backward", MACHINE)
    assert both == pytest.approx(3 * (737.28 + 61.44 + 614.4))
    # The router stays in fp32, the experts' weights have half the bytes.
    assert roofline_seconds(TINY, "bf16", "forward", MACHINE) == pytest.approx(368.64 + 61.44 + 307.2)


def test_the_machine_is_measured_by_the_clock():
    ticks = iter(range(1_000_000))
    # Every call takes one second: the largest matmul has the highest rate, but a second is long enough.
    machine = measure_machine(["bf16"], 3, lambda: float(next(ticks)))
    assert set(machine.flops) == {"fp32", "bf16"}
    assert machine.flops["bf16"] == (2 * 512**3,) * 3
    assert machine.bandwidth == (2 * (128 << 20),) * 3
    assert set(machine.to_dict()) == {"matmul_fp32_flops", "matmul_bf16_flops", "copy_bytes"}
    assert machine.to_dict()["copy_bytes"]["median"] == 2 * (128 << 20)


@pytest.mark.parametrize("text", ["", "1x2x3x4", "1x2x3x4x5x6", "axbxcxdxe", "8x8x8x2x3", "0x8x8x2x1"])
def test_a_row_that_is_none_is_refused(text: str):
    with pytest.raises(UserError, match="row "):
        BenchRun(rows=(text,))


def test_a_row_s_name_is_what_rows_takes():
    run = BenchRun(rows=("48x16x8x4x2", "48x16x8x2x2", "48x16x8x4x2"), dtypes=("fp32", "fp32"))
    assert run.shapes() == (TINY, TINY._replace(num_experts=2))
    assert TINY.name == "48x16x8x4x2"
    cells = run.cells()
    assert [(cell.dtype, cell.kind) for cell in cells[:2]] == [
        ("fp32", "forward"),
        ("fp32", "forward-backward"),
    ]
    assert len(cells) == 4
    assert cells[0].few == TINY._replace(num_experts=2)
    assert cells[2].few is None
    assert BenchRun().shapes() == GRID
    assert BenchRun(quick=True).shapes() == QUICK


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rounds": 10}, "rounds 10"),
        ({"quick": True, "rows": (TINY.name,)}, "--quick with --rows"),
        ({"dtypes": ()}, "dtypes is empty"),
        ({"passes": ()}, "passes is empty"),
        ({"backend": "grouper"}, "did you mean 'grouped'"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings: dict, said: str):
    with pytest.raises(UserError, match=said):
        BenchRun(**settings)


def test_the_quick_rows_leave_out_what_takes_minutes():
    assert all(grid.gathered_bytes(shape, "bf16") > 1 << 30 for shape in QUICK)
    assert any(grid.fewest(shape, QUICK) for shape in QUICK)
    assert Shape(4096, 64, 128, 64, 1) in GRID
