"""The report on a bucket: the cost of calls, the waste by padding, and a page without links."""

from __future__ import annotations

import operator
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from nanovllm.cli.main import run
from nanovllm.compile.lower import calls
from nanovllm.compile.trace import trace
from nanovllm.kernels import ops
from nanovllm.tools import device_limits, report, report_data, report_page
from nanovllm.tools.costs import cost, tokens_per_expert
from nanovllm.tools.device_limits import DeviceLimits
from nanovllm.tools.report_data import MeasuredCall, Padding, RegionReport, Report
from nanovllm.tools.report_experts import experts
from tests.conftest import save_tiny


def test_costs_are_bytes_that_must_move_and_flops_of_products() -> None:
    x_TD, w_OD = torch.ones(3, 8), torch.ones(5, 8)
    assert cost(ops.linear, [x_TD, w_OD, None], {}, torch.ones(3, 5)) == (
        4 * (24 + 40 + 15),
        2 * 3 * 40,
    )
    mm = torch.ops.aten.mm.default
    assert cost(mm, [x_TD, w_OD.t()], {}, torch.ones(3, 5)) == (4 * (24 + 40 + 15), 2 * 3 * 40)
    assert cost(ops.silu_mul, [x_TD], {}, torch.ones(3, 4)) == (4 * (24 + 12), 0)
    assert cost(
        ops.add_rms_norm, [x_TD, x_TD, torch.ones(8), 1e-6], {}, (x_TD.clone(), x_TD.clone())
    )[0] == 4 * (24 * 3 + 8)
    assert cost(torch.ops.aten.view.default, [x_TD, [24]], {}, x_TD.view(24)) == (0, 0)
    assert cost(operator.getitem, [[x_TD], 0], {}, x_TD) == (0, 0)
    embedding = torch.ops.aten.embedding.default
    assert cost(embedding, [torch.ones(1000, 8), torch.zeros(3).long()], {}, x_TD) == (2 * 96, 0)


@pytest.mark.parametrize("chosen", [[[0, 1]], [[4, 2], [2, 4], [4, 2]], [[0, 1], [1, 2], [3, 4]]])
def test_experts_cost_those_that_the_call_s_tokens_choose(chosen: list[list[int]]) -> None:
    expert_TK = torch.tensor(chosen, dtype=torch.int32)
    num_tokens, num_distinct = len(chosen), len({one for token in chosen for one in token})
    x_TD, weight_TK = torch.ones(num_tokens, 8), torch.ones(expert_TK.shape)
    gate_up_EGD, down_EDF = torch.ones(5, 6, 8), torch.ones(5, 8, 3)
    flops = 2 * 2 * num_tokens * (6 * 8 + 8 * 3)
    num_bytes = 4 * (2 * 8 * num_tokens + 4 * num_tokens + num_distinct * (6 * 8 + 8 * 3))
    args = [x_TD, weight_TK, expert_TK, gate_up_EGD, down_EDF]
    assert cost(ops.experts, args, {}, x_TD.clone()) == (num_bytes, flops)
    with_residual = num_bytes + x_TD.nbytes
    assert cost(ops.experts, [*args, x_TD.clone()], {}, x_TD.clone()) == (with_residual, flops)
    y_TKO = torch.ones(num_tokens, 2, 6)
    for x in (x_TD, torch.ones(num_tokens, 2, 8)):
        num_bytes = x.nbytes + expert_TK.nbytes + 4 * num_distinct * 6 * 8 + y_TKO.nbytes
        found = cost(ops.expert_linear, [x, expert_TK, gate_up_EGD], {}, y_TKO)
        assert found == (num_bytes, 2 * 2 * num_tokens * 6 * 8)


def test_experts_on_the_host_cost_the_same_where_they_are_multiplied_by() -> None:
    x_TD, weight_TK = torch.ones(3, 8), torch.ones(3, 2)
    expert_TK = torch.tensor([[4, 2], [2, 4], [4, 2]], dtype=torch.int32)
    slot_I, first_1 = torch.tensor([-1, -2, 0, -4, 1]), torch.zeros(1, dtype=torch.int64)
    slots = [torch.ones(3, 6, 8), torch.ones(3, 8, 3)]
    others = [torch.ones(5, 6, 8), torch.ones(5, 8, 3)]
    args = [x_TD, weight_TK, expert_TK, 5, first_1, slot_I, *slots, *others]
    stacked = cost(ops.experts, [*args[:3], *others], {}, x_TD)
    table_bytes = first_1.nbytes + slot_I.nbytes
    expected = (stacked[0] + table_bytes, stacked[1])
    assert cost(ops.offloaded_experts, args, {}, x_TD) == expected
    assert tokens_per_expert(ops.offloaded_experts, args, {}) == (0, 0, 3, 0, 3)
    moved = cost(ops.fetch_experts, [expert_TK, *[first_1] * 4, *others, *slots], {}, expert_TK)
    assert moved == (2 * expert_TK.nbytes, 0)


def test_experts_of_other_ranks_cost_nothing() -> None:
    """Tokens choose experts 4 and 2, or 2 and 0; of these 2 is here. All choices are shown."""
    x_TD, weight_TK = torch.ones(3, 8), torch.ones(3, 2)
    expert_TK = torch.tensor([[4, 2], [2, 0], [0, 4]], dtype=torch.int32)
    local_X = torch.tensor([-1, -1, 0, 1, -1], dtype=torch.int32)
    stacks = [torch.ones(2, 6, 8), torch.ones(2, 8, 3)]
    args = [x_TD, weight_TK, expert_TK, *stacks, None, local_X]
    rows = 2 * x_TD.nbytes + weight_TK.nbytes + expert_TK.nbytes + local_X.nbytes
    matrices = 6 * 8 + 8 * 3
    assert cost(ops.experts, args, {}, x_TD.clone()) == (rows + 4 * matrices, 2 * 2 * matrices)
    assert tokens_per_expert(ops.experts, args, {}) == (2, 0, 2, 0, 2)


def test_routing_costs_the_scores_and_the_router_s_product() -> None:
    logits_TE, x_TD, router_ED = torch.ones(3, 5), torch.ones(3, 8), torch.ones(5, 8)
    chosen = ops.topk_softmax(logits_TE, 2, True)
    assert cost(ops.topk_softmax, [logits_TE, 2, True], {}, chosen) == (4 * (15 + 6 + 6), 0)
    norm_D = torch.ones(8)
    found = cost(
        ops.norm_router_topk, [x_TD, norm_D, router_ED, 1e-6, 2, True], {}, (x_TD, *chosen)
    )
    assert found == (4 * (2 * 24 + 8 + 40 + 6 + 6), 2 * 3 * 40)


@pytest.mark.parametrize(
    "seq_lens, q_start, max_q_len, window, keys, pairs",
    [
        ([5, 1, 99], [0, 1, 2, 3], 1, 0, 105, 105),
        ([5, 99], [0, 1, 2], 1, 10, 15, 15),
        ([4], [0, 4], 4, 0, 4, 10),
        ([7, 0], [0, 3, 3], 3, 0, 7, 18),
    ],
)
def test_attention_costs_the_keys_that_are_seen(
    seq_lens: list[int], q_start: list[int], max_q_len: int, window: int, keys: int, pairs: int
) -> None:
    num_tokens = q_start[-1]
    q_TNH, cache = torch.ones(num_tokens, 4, 16), torch.ones(50, 16, 2, 16)
    table_RP = torch.zeros(len(seq_lens), 7).int()
    rows = [table_RP, torch.tensor(seq_lens), torch.tensor(q_start), max_q_len]
    args = [q_TNH, cache, cache, *rows, 0.25, window]
    expected = 2 * q_TNH.nbytes + 2 * keys * 2 * 16 * 4
    assert cost(ops.paged_attention, args, {}, torch.ones_like(q_TNH)) == (
        expected,
        4 * pairs * 4 * 16,
    )


def test_attention_over_latents_reads_an_entry_once_for_all_heads() -> None:
    q_TNZ, cache = torch.ones(5, 4, 48), torch.ones(9, 16, 48)
    table_RP, seq_len_R = torch.zeros(2, 3).int(), torch.tensor([19, 33]).int()
    start_S = torch.tensor([0, 2, 5]).int()
    args = [q_TNZ, cache, table_RP, seq_len_R, start_S, 3, 0.1, 40]
    out = torch.ones(5, 4, 40)
    pairs = (18 + 19) + (31 + 32 + 33)
    expected = q_TNZ.nbytes + out.nbytes + (19 + 33) * 48 * 4, 2 * pairs * 4 * (48 + 40)
    assert cost(ops.latent_attention, args, {}, out) == expected
    q_TNH, key_NPL, value_NVL = torch.ones(5, 4, 24), torch.ones(4, 16, 40), torch.ones(4, 20, 40)
    kv_TZ, table_Mr, places_T = torch.ones(5, 48), torch.ones(64, 8), torch.zeros(5).long()
    args = [q_TNH, key_NPL, kv_TZ, torch.ones(40), table_Mr, places_T, places_T, cache, 1e-6]
    num_bytes = q_TNH.nbytes + key_NPL.nbytes + 3 * kv_TZ.nbytes + 40 * 4 + 5 * 8 * 4 + q_TNZ.nbytes
    flops = 2 * 5 * key_NPL.numel()
    assert cost(ops.latent_inputs, args, {}, (q_TNZ, kv_TZ)) == (num_bytes, flops)
    value_TNV = torch.ones(5, 4, 20)
    num_bytes = out.nbytes + value_NVL.nbytes + value_TNV.nbytes
    found = cost(ops.head_linear, [out, value_NVL], {}, value_TNV)
    assert found == (num_bytes, 2 * 5 * value_NVL.numel())
    args = [q_TNH, q_TNZ, kv_TZ, key_NPL, value_NVL, cache, table_RP, seq_len_R, start_S, 3, 0.1]
    read = (*args[:5], value_TNV)
    num_bytes = sum(one.nbytes for one in read) + (19 + 33) * 48 * 4
    flops = 2 * 5 * (key_NPL.numel() + value_NVL.numel()) + 2 * pairs * 4 * (24 + 20)
    assert cost(ops.latent_span_attention, args, {}, value_TNV) == (num_bytes, flops)


def test_padding_is_what_a_trace_leaves_of_each_bucket() -> None:
    found = report_data.padding_of([1, 3, 4, 5, 20], [1, 4, 16])
    assert [(part.bucket, part.num_steps, part.num_rows) for part in found] == [
        (1, 1, 1),
        (4, 3, 11),
        (16, 2, 21),
    ]
    assert found[1].waste == pytest.approx(1 / 12) and Padding(8, 0, 0).waste == 0.0


def test_every_call_of_a_list_is_measured_with_its_own_arguments() -> None:
    def region(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor]:
        return (ops.silu_mul(ops.linear(x, w, None)).view(-1),)

    inputs = [torch.ones(3, 4), torch.ones(6, 4)]
    made = calls.lower(*trace(region, {"x": inputs[0], "w": inputs[1]})[:2])
    times = iter((1.0, 2.0))
    measured = report_data.measure(made, inputs, lambda call: (call(), next(times))[1])
    assert [(call.op, call.shapes, call.seconds) for call in measured] == [
        ("linear", "f32[3, 6]", 1.0),
        ("silu_mul", "f32[3, 3]", 2.0),
    ]


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures the device's limits on small tensors: quickly."""
    monkeypatch.setattr(device_limits, "COPY_BYTES", (1 << 20,))
    monkeypatch.setattr(device_limits, "MATRIX_SIZES", (64,))


class Checker(HTMLParser):
    """Finds elements that are not closed, and attributes that fetch something."""

    VOID = ("meta", "br", "rect", "path", "i")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


def assert_stands_alone(text: str) -> None:
    checker = Checker()
    checker.feed(text)
    assert not checker.open and not checker.fetched
    assert not re.search(r"https?://|@import|url\(", text)


def test_names_cannot_break_the_page() -> None:
    call = MeasuredCall("<script>alert(1)</script>", 'f32["&"]', 1e-5, 10, 0)
    made = Report(
        "a <b> model",
        {"<device>": '"x"'},
        DeviceLimits(1e9, 1e12),
        (RegionReport("layer", 2, [], [call]),),
        (),
        "<trace>",
    )
    text = report_page.page(made)
    assert_stands_alone(text)
    assert text.count("<script>") == 1 and "<b> model" not in text


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "bucket, num_regions, times",
    [(["--bs", "3"], 4, ["layer × 3"]), (["--tokens", "64"], 5, ["layer × 2", "last"])],
)
def test_the_page_shows_graphs_kernels_and_padding(
    tmp_path: Path,
    bucket: list[str],
    num_regions: int,
    times: list[str],
    device: str,
    small_limits: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trace_file, out = tmp_path / "sizes.txt", tmp_path / "report.html"
    trace_file.write_text("1 2 3\n3 4 1\n")
    model = save_tiny(tmp_path / "model", num_hidden_layers=3)
    options = f"--context 19 --device {device} --max-model-len 64 --max-num-seqs 4"
    arguments = ["--model", str(model), *bucket, "-o", str(out), "--trace", str(trace_file)]
    arguments += [*options.split(), "--max-num-batched-tokens", "64"]
    run("report", arguments)
    text = out.read_text(encoding="utf-8")
    assert_stands_alone(text)
    for word in (
        "paged_attention",
        "qk_norm_rope_store",
        "fuse rope store",
        "aten.split_with_sizes",
        "% padding",
        *(f">{name}<" for name in times),
    ):
        assert word in text, word
    assert f"{num_regions} regions" in capsys.readouterr().out


@pytest.mark.parametrize("bucket, num_tokens", [(["--bs", "19"], 19), (["--tokens", "64"], 64)])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_layers_with_experts_show_the_tokens_of_each(
    architecture: str, bucket: list[str], num_tokens: int, small_limits: None, tmp_path: Path
) -> None:
    sizes = {"num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 48}
    changes = {"mlp_only_layers": [0], "num_experts_per_tok": 3, **sizes}
    model, out = save_tiny(tmp_path / "model", architecture, **changes), tmp_path / "report.html"
    options = "--context 19 --device cpu --max-model-len 64 --max-num-batched-tokens 64"
    options += " --max-num-seqs 32"
    run("report", ["--model", str(model), *bucket, "-o", str(out), *options.split()])
    text = out.read_text(encoding="utf-8")
    assert_stands_alone(text)
    drawn = re.findall(r"<h3>(\w+), (\d+) in a step</h3>(.*?)</svg>", text, re.DOTALL)
    # in prefill, a last layer goes on with one token of each row
    names = [name.partition("_")[0] for name, *_ in drawn]
    sparse = ["layer"] if bucket[0] == "--bs" else ["layer", "last"]
    assert names == (sparse if architecture == "mixtral" else sparse[-1:])
    for name, _, drawing in drawn:
        per_expert = [int(num) for num in re.findall(r"expert \d+: (\d+) tokens", drawing)]
        num_rows = 32 if name.startswith("last") else num_tokens
        assert len(per_expert) == 8 and sum(per_expert) == 3 * num_rows
        chosen = sum(num > 0 for num in per_expert)
        assert f"{chosen} of 8 experts</b> are chosen, by {max(per_expert)} tokens" in drawing
        assert chosen > 3 or name.startswith("last"), "different tokens choose different experts"


def test_experts_are_drawn_as_high_as_their_tokens() -> None:
    call = MeasuredCall("experts", "f32[9, 8]", 2e-3, 10**6, 0, (3, 0, 6))
    other = MeasuredCall("linear", "", 1.0, 10, 10)
    regions = [RegionReport("layer", 5, [], [other, call]), RegionReport("head", 1, [], [other])]
    drawn = experts(regions, DeviceLimits(1e9, 1e12))
    assert re.findall(r'<rect [^>]* height="([\d.]+)"', drawn) == ["60.0", "0.0", "120.0"]
    assert "<h3>layer, 5 in a step" in drawn and "head" not in drawn
    assert "2 of 3 experts</b> are chosen, by 6 tokens at most" in drawn
    assert "1 MB</b> in 2.00 ms: <b>50% of the device" in drawn
    assert experts(regions[1:], DeviceLimits(1e9, 1e12)) == ""


@pytest.mark.parametrize(
    "change, message",
    [
        (["--context", "64"], "context is 64: it must be at least 1 and below max_model_len (64)"),
        (["--bs", "0"], "graph_batch_sizes is"),
        (["--trace", "/nowhere"], "No such file"),
        (["-o", "/proc/x/report.html"], "No such file"),
    ],
)
def test_mistakes_are_named(
    tiny_qwen3: Path, change: list[str], message: str, small_limits: None, tmp_path: Path
) -> None:
    options = "--device cpu --max-model-len 64 --max-num-batched-tokens 64 --context 19"
    arguments = ["--model", str(tiny_qwen3), "--bs", "2", "-o", str(tmp_path / "r.html")]
    arguments += [*options.split(), *change]
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        run("report", arguments)


@pytest.mark.parametrize(
    "content, message", [("", "is empty"), ("1 two", "holds no batch sizes"), ("[1, 0]", "holds 0")]
)
def test_a_trace_that_is_none_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t").write_text(content)
    with pytest.raises(ValueError, match=message):
        report.read_trace(tmp_path / "t")
