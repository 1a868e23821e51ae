"""The reader of PTX text."""

from __future__ import annotations

import pytest
from ptx import ParseError, parse
from ptx.parser import address, members, split
from ptx.snippet import kernel

TEXT = """
.version 8.4 .target sm_90a .address_size 64
.extern .shared .align 128 .b8 dynamic[];
.visible .shared .align 8 .b64 slots[4];
.shared .align 16 .f32 tile[2][8];
.global .align 1 .b8 _$_name[4] = {65, 66};
.const .align 4 .u32 factor = 0x10;
.visible .entry first(.param .u8 a, .param .u64 .ptr .global .align 16 b, .param .align 8 .b8 c[12], .param .f32 d)
.maxntid 128 .reqntid 64, 2 .reqnctapercluster 4
{
    .reg .pred %p<2>; .reg .b32 %r<3>, %odd;
    .loc 1 3 0  // a.py:3:0
    $L__BB0_1: @!%p1 bra $skip;   /* comment; with semicolon */
    { .reg .b64 %r1; .reg .pred p; mov.b64 %r1, {%r0, %r2}; setp.ne.b32 p, %r2, 0; @p bra $skip; }
    { .reg .pred p; $skip: @p bra $L__BB0_1; }
    $skip: ld.global.L1::evict_last.v2.b32 { %r0, %r1 }, [ %r2 + -16 ];
    ret;
}
.entry second() { ret; }
"""


def test_a_kernel_is_found_by_name_with_its_shape() -> None:
    first = parse(TEXT, "first")
    assert (first.threads, first.cluster) == (128, (4, 1, 1))
    assert [(p.name, p.offset, p.size) for p in first.parameters.values()] == [
        ("a", 0, 1),
        ("b", 8, 8),
        ("c", 16, 12),
        ("d", 28, 4),
    ]
    assert first.shared == {"slots": 0, "tile": 32}
    assert first.shared_bytes == 96
    assert (first.dynamic, first.dynamic_alignment) == (("dynamic",), 128)
    assert first.constants == {"_$_name": b"AB\0\0", "factor": b"\x10\0\0\0"}
    assert len(parse(TEXT, "second").instructions) == 1


@pytest.mark.parametrize("name", [None, "third"])
def test_an_ambiguous_or_unknown_kernel_is_an_error(name: str | None) -> None:
    with pytest.raises(ParseError, match="first"):
        parse(TEXT, name)


def test_names_of_inner_scopes_are_renamed_apart() -> None:
    instructions = parse(TEXT, "first").instructions
    packed, compared, inner, other = instructions[1:5]
    assert packed.operands == ("%r1$1", "{%r0, %r2}")
    assert compared.operands[0] == inner.guard == "p$1"
    assert other.guard == "p$2"
    assert parse(TEXT, "first").registers["%r1$1"] == 64
    assert parse(TEXT, "first").registers["%r1"] == 32


def test_branches_find_the_innermost_label() -> None:
    instructions = parse(TEXT, "first").instructions
    assert [i.target for i in instructions if i.opcode == "bra"] == [5, 5, 0]
    assert (instructions[0].guard, instructions[0].negated) == ("%p1", True)


def test_modifiers_and_operands() -> None:
    load = parse(TEXT, "first").instructions[5]
    assert load.modifiers == ("global", "L1::evict_last", "v2", "b32")
    assert members(load.operands[0]) == ["%r0", "%r1"]
    assert address(load.operands[1]) == ("%r2", -16)
    assert address("[shared_name]") == ("shared_name", 0)
    assert split("a, {b, c}, [d+4], (e, f)") == ["a", "{b, c}", "[d+4]", "(e, f)"]


@pytest.mark.parametrize("line", ["bra $nowhere;", "mov.u32 %w1, 5", ".frobnicate 3;", "Mov.u32 %w1, 5;"])
def test_malformed_text_is_refused(line: str) -> None:
    with pytest.raises(ParseError):
        parse(kernel(line).replace("\nret;", "" if line.endswith("5") else "\nret;"))
