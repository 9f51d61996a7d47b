"""What is read from optimized HLO, on texts of a few lines; nothing is compiled."""

import textwrap

import pytest

from softmax_jax.benchmark import hlo

ARRAY = 4 * 16 * 256  # bytes of f32[16,256]


def program(body, *computations, arguments="x: f32[16,256]"):
  """A program whose entry has the lines of `body`."""
  text = "HloModule jit_f, is_scheduled=true\n\nFileNames\n1 'a.py'\n\n"
  for each in (*computations, f"ENTRY %main ({arguments}) -> f32[] {{\n{body}\n}}"):
    head, *lines, last = textwrap.dedent(each).strip().splitlines()
    text += "\n".join([head, *("  " + line.strip() for line in lines), last]) + "\n\n"
  return hlo.parse(text)


def moved(found):
  """Bytes read and written by all kernels."""
  kernels = hlo.kernels(found)
  return tuple(sum(k.runs * getattr(k, key) for k in kernels) for key in ("reads", "writes"))


PARAMETER = "%x = f32[16,256]{1,0} parameter(0)\n"


def test_reads_operands_and_writes_outputs_once_each():
  found = program(
    """%x = f32[16,256]{1,0} parameter(0), metadata={op_name="a(b" scheduling_name="x"}
    %zero = f32[] constant(0)
    %sum = (f32[16]{0}, bf16[16,256]{1,0}) fusion(%x, %x), kind=kInput, calls=%fused
    %row = f32[16]{0} get-tuple-element(%sum), index=0
    %same = f32[16,1]{1,0} bitcast(%row)
    ROOT %out = (f32[16,1]{1,0}) tuple(%same)""",
    """%fused (a: f32[16,256], b: f32[16,256]) -> (f32[16], bf16[16,256]) {
    %a = f32[16,256]{1,0} parameter(0)
    %b = f32[16,256]{1,0} parameter(1)
    %product = f32[16,256]{1,0} multiply(%a, %b)
    %half = bf16[16,256]{1,0} convert(%product)
    %zero.1 = f32[] constant(0)
    %total = f32[16]{0} reduce(%product, %zero.1), dimensions={1}, to_apply=%add
    ROOT %both = (f32[16]{0}, bf16[16,256]{1,0}) tuple(%total, %half)
    }""",
  )
  (kernel,) = hlo.kernels(found)  # x is read twice, as the fusion takes it twice.
  assert kernel == hlo.Kernel("fusion", 1, 2 * ARRAY, 4 * 16 + ARRAY // 2, 0, (), False)
  assert hlo.argument_bytes(found) == [ARRAY]


def test_an_output_of_several_arrays_may_be_one_of_several():
  found = program(
    """%x = f32[16,256]{1,0} parameter(0)
    ROOT %all = (pred[16]{0}, (f32[16]{0}, f32[16]{0})) fusion(%x), kind=kInput, calls=%fused""",
    """%fused (a: f32[16,256]) -> (pred[16], (f32[16], f32[16])) {
    %a = f32[16,256]{1,0} parameter(0)
    %some = pred[16]{0} reduce(%a, %a), dimensions={1}, to_apply=%or
    %two = (f32[16]{0}, f32[16]{0}) reduce(%a, %a, %a, %a), dimensions={1}, to_apply=%both
    ROOT %all = (pred[16]{0}, (f32[16]{0}, f32[16]{0})) tuple(%some, %two)
    }""",
  )
  assert moved(found) == (ARRAY, 16 + 2 * 4 * 16)


@pytest.mark.parametrize(
  ("shape", "size", "padded"),
  [
    ("f32[]", 4, 4),
    ("pred[3,5]{1,0}", 15, 15),
    ("s4[3]{0}", 2, 2),
    ("f8e4m3fn[8]{0}", 8, 8),
    ("c64[2]{0}", 16, 16),
    ("f32[]{:T(128)}", 4, 512),
    ("bf16[8192,128]{1,0:T(8,128)(2,1)}", 2**21, 2**21),
    ("f32[8192,1]{1,0:T(8,128)}", 2**15, 2**22),  # A column of numbers, as wide as a tile,
    ("f32[8192,1]{0,1:T(1,128)}", 2**15, 2**15),  # and as a row.
    ("f32[3,130]{1,0:T(8,128)}", 1560, 8192),
  ],
)
def test_bytes_of_arrays_and_of_their_tiles(shape, size, padded):
  found = program(f"%x = {shape} parameter(0)\nROOT %y = {shape} negate(%x)", arguments="x: f32[]")
  assert hlo.argument_bytes(found) == [size]
  assert moved(found) == (padded, padded)


def test_arrays_on_the_chip_cost_nothing():
  found = program(
    """%x = f32[16,256]{1,0:T(8,128)} parameter(0)
    %near = f32[16,256]{1,0:T(8,128)S(1)} negate(%x), backend_config={"estimated_cycles":"70"}
    %nearer = f32[16,256]{1,0:T(8,128)S(1)} exponential(%near)
    ROOT %y = f32[16,256]{1,0:T(8,128)} negate(%nearer),
      backend_config={"estimated_cycles":"9223372036854775807"}""".replace(",\n", ", ")
  )
  kernels = hlo.kernels(found)
  assert [(k.reads, k.writes, k.cycles) for k in kernels] == [
    (ARRAY, 0, 70),
    (0, 0, 0),
    (0, ARRAY, 0),
  ]


CONDITION = """%condition (c: (s32[], f32[16,256])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[16,256]{1,0:T(8,128)}) parameter(0)
  %end = s32[]{:T(128)} constant(7)
  %i.c = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %more = pred[]{:T(512)} compare(%i.c, %end), direction=LT
  }"""
BODY = """%body (b: (s32[], f32[16,256])) -> (s32[], f32[16,256]) {
  %b = (s32[], f32[16,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %z = f32[16,256]{1,0} get-tuple-element(%b), index=1
  %w = f32[16,256]{1,0} negate(%z)
  ROOT %next = (s32[], f32[16,256]{1,0}) tuple(%i, %w)
  }"""
LOOP = """%x = f32[16,256]{1,0} parameter(0)
  %begin = s32[] constant(2)
  %copied = s32[] copy(%begin)
  %start = (s32[], f32[16,256]{1,0}) tuple(%copied, %x)
  ROOT %loop = (s32[], f32[16,256]{1,0}) while(%start), condition=%condition, body=%body"""


def test_loops_run_as_often_as_is_known():
  runs = lambda found: [k.runs for k in hlo.kernels(found) if k.opcode == "negate"]
  assert runs(program(LOOP, CONDITION, BODY)) == [5]  # From 2 to 7.
  known = LOOP + ', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0"}}'
  assert runs(program(known, CONDITION, BODY)) == [3]
  outer = LOOP.replace("%body", "%outer").replace("%condition", "%outer_condition")
  nested = BODY.replace("%body", "%outer").replace(
    "%w = f32[16,256]{1,0} negate(%z)",
    """%inner = (s32[], f32[16,256]{1,0}) while(%b), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
    %w = f32[16,256]{1,0} get-tuple-element(%inner), index=1""",
  )
  outer_condition = CONDITION.replace("%condition", "%outer_condition")
  assert runs(program(outer, CONDITION, BODY, outer_condition, nested)) == [20]


def test_a_loop_that_may_run_any_number_of_times_is_an_error():
  for condition in (CONDITION.replace("LT", "NE"), CONDITION.replace("constant(7)", "add(%c, %c)")):
    with pytest.raises(ValueError, match="how often does the loop loop run"):
      hlo.kernels(program(LOOP, condition, BODY))


def test_of_a_slice_only_its_part_is_read_and_written():
  found = program(
    """%x = f32[16,256]{1,0} parameter(0)
    %i = s32[] constant(3)
    %zero = s32[] constant(0)
    %part = f32[4,256]{1,0} dynamic-slice(%x, %i, %zero), dynamic_slice_sizes={4,256}
    ROOT %into = f32[16,256]{1,0} dynamic-update-slice(%x, %part, %i, %zero)"""
  )
  slice_, update = hlo.kernels(found)
  assert (slice_.reads - 8, slice_.writes) == (ARRAY // 4, ARRAY // 4)
  assert (update.reads - 8, update.writes) == (ARRAY // 4, ARRAY // 4)


def test_of_a_slice_in_a_fusion_too():
  found = program(
    """%x = bf16[16,256]{1,0} parameter(0)
    %y = f32[16,256]{1,0} parameter(1)
    %i = s32[] parameter(2)
    ROOT %out = f32[16,256]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%fused""",
    """%fused (a: bf16[16,256], b: f32[16,256], j: s32[]) -> f32[16,256] {
    %a = bf16[16,256]{1,0} parameter(0)
    %b = f32[16,256]{1,0} parameter(1)
    %j = s32[] parameter(2)
    %zero = s32[] constant(0)
    %wide = f32[16,256]{1,0} convert(%a)
    %part = f32[4,256]{1,0} dynamic-slice(%wide, %j, %zero), dynamic_slice_sizes={4,256}
    %old = f32[4,256]{1,0} dynamic-slice(%b, %j, %zero), dynamic_slice_sizes={4,256}
    %sum = f32[4,256]{1,0} add(%old, %part)
    %into = f32[16,256]{1,0} dynamic-update-slice(%b, %sum, %j, %zero)
    ROOT %same = f32[16,256]{1,0} bitcast(%into)
    }""",
    arguments="x: bf16[16,256], y: f32[16,256], i: s32[]",
  )
  assert moved(found) == (ARRAY // 2 // 4 + ARRAY // 4 + 4, ARRAY // 4)


def test_gathers_and_scatters_touch_few_entries():
  found = program(
    """%x = f32[16,256]{1,0} parameter(0)
    %indices = s32[16,2]{1,0} parameter(1)
    %at = f32[16]{0} gather(%x, %indices), offset_dims={}
    ROOT %out = f32[16,256]{1,0} scatter(%x, %indices, %at), to_apply=%add""",
    arguments="x: f32[16,256], indices: s32[16,2]",
  )
  gather, scatter = hlo.kernels(found)
  numbers, indices = 4 * 16, 4 * 32
  assert (gather.reads, gather.writes) == (numbers + indices, numbers)
  assert (scatter.reads, scatter.writes) == (2 * numbers + indices, numbers)


def test_asynchronous_pairs_count_once():
  found = program(
    """%x = f32[16,256]{1,0:T(8,128)} parameter(0)
    %fetch-start = (f32[16,256]{1,0:T(8,128)S(1)}, f32[16,256]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%x)
    %fetch-done = f32[16,256]{1,0:T(8,128)S(1)} copy-done(%fetch-start)
    %slice-start = ((f32[16,256]{1,0:T(8,128)}), f32[8,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) \
slice-start(%x), slice={[0:8], [0:256]}
    ROOT %slice-done = f32[8,256]{1,0:T(8,128)S(1)} slice-done(%slice-start)"""
  )
  assert [(k.opcode, k.reads, k.writes) for k in hlo.kernels(found)] == [
    ("copy", ARRAY, 0),
    ("slice", ARRAY // 2, 0),
  ]


def test_what_was_started_in_the_round_before_counts_where_it_ends():
  found = program(
    """%begun = (f32[16,256]{1,0:T(8,128)}, f32[16,256]{1,0:T(8,128)S(1)}) parameter(0)
    %copied = f32[16,256]{1,0:T(8,128)} get-tuple-element(%begun), index=0
    ROOT %done = f32[16,256]{1,0:T(8,128)S(1)} copy-done(%copied)"""
  )
  assert moved(found) == (ARRAY, 0)


def test_calls_may_get_their_operands_later():
  called = """%called (a: f32[16,256]) -> f32[16,256] {
    %a = f32[16,256]{1,0} parameter(0)
    ROOT %b = f32[16,256]{1,0} negate(%a)
    }"""
  found = program(
    """%x = f32[16,256]{1,0} parameter(0)
    %start = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), to_apply=%called
    %update = ((f32[16,256]{1,0}), f32[16,256]{1,0}) call-update(%start, %x)
    ROOT %done = f32[16,256]{1,0} call-done(%update)""",
    called,
  )
  assert moved(found) == (ARRAY, ARRAY)
  for kind, key in (("call", "to_apply"), ("async", "calls")):
    body = "ROOT %y = f32[16,256]{1,0} call(%x), to_apply=%called"
    if kind == "async":
      body = f"""%s = ((f32[16,256]{{1,0}}), f32[16,256]{{1,0}}) async-start(%x), {key}=%called
      ROOT %d = f32[16,256]{{1,0}} async-done(%s)"""
    assert moved(program(PARAMETER + body, called)) == (ARRAY, ARRAY)


def test_of_a_conditional_the_larger_branch_counts():
  branch = """%{0} (a: f32[16,256]) -> f32[16,256] {{
    %a = f32[16,256]{{1,0}} parameter(0)
    {1}
    }}"""
  one = branch.format("one", "ROOT %b = f32[16,256]{1,0} negate(%a)")
  two = branch.format(
    "two", "%b = f32[16,256]{1,0} negate(%a)\n    ROOT %c = f32[16,256]{1,0} negate(%b)"
  )
  shape = "f32[16,256]{1,0}"
  for called in (
    "branch_computations={%one, %two}",
    "true_computation=%two, false_computation=%one",
    "true_computation=%one, false_computation=%two",
  ):
    body = f"%p = pred[] constant(true)\nROOT %y = {shape} conditional(%p, %x, %x), {called}"
    assert moved(program(PARAMETER + body, one, two)) == (2 * ARRAY, 2 * ARRAY)


def test_collectives_and_their_bytes():
  fused = """%fused (a: f32[16]) -> f32[16] {
    %a = f32[16]{0} parameter(0)
    ROOT %r = f32[16]{0} all-reduce(%a), replica_groups=mesh['v'=8] {'v'}, to_apply=%add
    }"""
  found = program(
    """%x = f32[16,256]{1,0:T(8,128)} parameter(0)
    %scalar = f32[]{:T(128)S(1)} parameter(1)
    %one = f32[]{:T(128)S(1)} all-reduce(%scalar), replica_groups={{0,1}}, to_apply=%add
    %start = (f32[16,256]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) all-gather-start(%x), \
dimensions={0}
    %all = f32[128,256]{1,0:T(8,128)} all-gather-done(%start)
    %row = f32[16]{0} slice(%x), slice={[0:16], [0:1]}
    %fs = ((f32[16]{0}), f32[16]{0}) fusion-start(%row), kind=kCustom, calls=%fused
    ROOT %fd = f32[16]{0} fusion-done(%fs)""",
    fused,
    arguments="x: f32[16,256], scalar: f32[]",
  )
  exchanged = [each for kernel in hlo.kernels(found) for each in kernel.exchanged]
  assert exchanged == [("all-reduce", 4), ("all-gather", 8 * ARRAY), ("all-reduce", 64)]


def test_kernels_that_are_not_those_of_xla_are_told():
  call = '{0} custom-call(%x), custom_call_target="{1}", backend_config={{"a":"(" }}'
  for target, hidden in (("tpu_custom_call", True), ("__cublas$gemm", False)):
    body = f"{PARAMETER}ROOT %y = {call.format('f32[16,256]{1,0}', target)}"
    (kernel,) = hlo.kernels(program(body))
    assert kernel.hidden == hidden
    assert (kernel.reads, kernel.writes) == (ARRAY, ARRAY)
  free = PARAMETER + 'ROOT %y = f32[16]{0} custom-call(), custom_call_target="AllocateBuffer"'
  assert hlo.kernels(program(free)) == []


def test_the_entry_need_not_come_last():
  found = program(f"{PARAMETER}ROOT %y = f32[16,256]{{1,0}} negate(%x)")
  other = "%other (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}"
  text = "ENTRY %main (x: f32[]) -> f32[] {\n  %x = f32[] parameter(0)\n"
  text += f"  ROOT %y = f32[] negate(%x)\n}}\n\n{other}\n"
  assert hlo.parse(text).entry == found.entry == "main"


def test_other_text_is_refused():
  with pytest.raises(ValueError, match="no HLO program"):
    hlo.parse("module @jit_f {}")
