"""Tests of the walkthrough's notebook and of its pictures.

pip install pytest matplotlib jupytext nbformat, then python -m pytest -q extras/test_walkthrough.py
"""

import json
import math
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import distribution  # noqa: E402
import notebook  # noqa: E402
import pictures  # noqa: E402
import study  # noqa: E402
import study_tables  # noqa: E402
import walk  # noqa: E402
from pictures import Bars, Compared, Token  # noqa: E402

import srpo  # noqa: E402
from corrupt import corrupt  # noqa: E402
from data import Example, Fact, Query, respond  # noqa: E402
from model import Rollout  # noqa: E402
from srpo import Role, parse_response  # noqa: E402

P = Role.PERCEPTION
R = Role.REASONING

# ---- the notebook


@pytest.fixture(scope="module")
def cells():
    return json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_the_notebook_is_made_of_the_source(cells):
    pytest.importorskip("jupytext", reason="pip install jupytext")
    written = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert written == notebook.sources(notebook.converted())


def test_all_cells_were_executed_without_errors(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}
    pictures_shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures_shown) >= 12


def test_the_notebook_has_its_nine_sections_and_what_to_look_for(cells):
    text = "".join("".join(cell["source"]) + "\n" for cell in cells if "outputs" not in cell)
    assert re.findall(r"^## (\d)\. ", text, re.MULTILINE) == list("123456789")
    for section in re.split(r"^## \d\. ", text, flags=re.MULTILINE)[1:]:
        assert "**In the paper, look for**" in section, section[:40]


def printed_by(cells) -> str:
    """What the cells of the notebook print."""
    printed = ""
    for cell in cells:
        for output in cell.get("outputs", []):
            printed += "".join(output.get("text", []))
    return printed


def test_each_step_shows_its_line_as_srpo_has_it(cells):
    printed = printed_by(cells)
    source = (HERE.parent / "srpo.py").read_text(encoding="utf-8")
    shown = re.findall(r"^.*# .*step \d.*$", printed, re.MULTILINE)
    for line in shown:
        assert line in source  # else make the notebook again
    steps = {int(step) for line in shown for step in re.findall(r"step (\d)", line)}
    assert steps == set(range(1, 10))


def test_the_example_by_hand_is_what_srpo_makes_of_its_log_probs(cells):
    lines = printed_by(cells).splitlines()
    start = [line.split() for line in lines].index(list(walk.WORDS)) + 1
    rows = {}
    for line in lines[start : start + 10]:
        rows[line[:18].strip()] = [line[18 + 7 * t : 25 + 7 * t].strip() for t in range(6)]
    roles = torch.tensor([["-PR".index(cell) for cell in rows["role"]]])
    contexts = []
    for name in ("as sampled", "corrupted image", "without perception"):
        contexts.append(torch.tensor([[float(cell or "nan") for cell in rows[name]]]))
    A = srpo.group_advantages([1, 0], 2)[:1]
    delta = srpo.contrast_scores(*contexts, roles)
    w = srpo.token_weights(delta, roles)
    A_hat = srpo.role_aware_advantages(A, w)
    computed = {"Δ": delta[0].tolist(), "w": w[0].tolist(), "Â": A_hat[0].tolist()}
    computed["A"] = A.tolist() * 6
    b = sum(computed["Δ"]) / 4
    computed["b"] = [b] * 4
    computed["w̃"] = [min(1.2, max(0.8, math.exp(x - b))) for x in computed["Δ"][:4]]
    for name, numbers in computed.items():
        expected = [f"{number:.2f}" for number in numbers]
        assert rows[name] == expected + [""] * (6 - len(expected)), name
    assert rows["Â"] == ["0.82", "0.70", "0.54", "0.77", "0.71", "0.71"]


def test_the_notebook_is_small_and_tells_no_time(cells):
    assert notebook.NOTEBOOK.stat().st_size < 1.5e6
    assert all(cell["metadata"] == {} for cell in cells)
    metadata = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))["metadata"]
    assert metadata == {"kernelspec": notebook.KERNEL}


def write_source(monkeypatch, tmp_path, text: str) -> None:
    (tmp_path / "walkthrough.py").write_text(text)
    monkeypatch.setattr(notebook, "HERE", tmp_path)
    monkeypatch.setattr(notebook, "SOURCE", tmp_path / "walkthrough.py")
    monkeypatch.setattr(notebook, "NOTEBOOK", tmp_path / "walkthrough.ipynb")


def test_a_notebook_is_made_and_checked(tmp_path, monkeypatch, capsys):
    for name in ("jupytext", "nbclient", "ipykernel", "scipy"):
        pytest.importorskip(name, reason=notebook.NEEDED)
    write_source(monkeypatch, tmp_path, "# %% [markdown]\n# # Title\n\n# %%\nprint(1 + 1)\n")
    assert notebook.main(["--check"]) == 2
    assert "No such file" in capsys.readouterr().err  # none has been made yet
    assert notebook.main([]) == 0
    made = notebook.NOTEBOOK.read_bytes()
    assert notebook.main(["--check"]) == 0
    assert notebook.main([]) == 0
    assert notebook.NOTEBOOK.read_bytes() == made
    assert json.loads(made)["cells"][1]["outputs"][0]["text"] == ["2\n"]
    capsys.readouterr()
    write_source(monkeypatch, tmp_path, "# %% [markdown]\n# # Title\n\n# %%\nprint(1 + 2)\n")
    assert notebook.main(["--check"]) == 2
    assert "other sources" in capsys.readouterr().err
    write_source(monkeypatch, tmp_path, "# %%\n1 / 0\n")
    assert notebook.main([]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "error: walkthrough.py: a cell fails: ZeroDivisionError: division by zero"
    assert notebook.NOTEBOOK.read_bytes() == made


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jupytext", None)
    assert notebook.main(["--check"]) == 2
    assert capsys.readouterr().err == f"error: jupytext is missing: {notebook.NEEDED}\n"


# ---- tokens


def test_texts_of_tokens_show_each_character_once():
    offsets = [(0, 2), (1, 2), (2, 5)]  # the first two share a character
    assert pictures.token_texts("aébcd", offsets, 5) == ["aé", "", "bcd", "EOS", "EOS"]


def test_strength_is_symmetric_around_weight_1():
    assert pictures.strength(1.0) == 0.5
    assert pictures.strength(2 / 3) == pytest.approx(0)
    assert pictures.strength(1.5) == pytest.approx(1)
    assert pictures.strength(0) == 0
    assert pictures.strength(9) == 1
    assert pictures.strength(1.2) + pictures.strength(1 / 1.2) == pytest.approx(1)


def test_tokens_are_placed_in_lines():
    tokens = [Token("aaaa", P), Token(" bbb", P), Token("c.\n", R), Token("d" * 9, R)]
    places = pictures.place_tokens(tokens, columns=10)
    assert [line for _, line, _ in places] == [0, 0, 1, 2]
    columns = [column for _, _, column in places]
    assert columns[0] == columns[2] == columns[3] == 0
    assert columns[1] == pytest.approx(4.6 + 0.5)
    assert pictures.tokens_height(tokens, 10) == 3 * pictures.line_height(tokens)
    wide = Token("a", P, numbers=("+12.345",))
    assert pictures.width_of(wide) > 5  # numbers must not run into each other


def test_a_token_has_the_color_and_the_line_of_its_role():
    tokens = [Token("a", P, 0.2), Token("b", P, 0.9), Token("$c$", R, 0.5, ("1.00",))]
    figure = pictures.token_picture([*tokens, Token(" ", Role.OTHER)], "title")
    axes = figure.axes[0]
    colors = [matplotlib.colors.to_hex(patch.get_facecolor()) for patch in axes.patches]
    blue = pictures.COLORS[P].lower()
    orange = pictures.COLORS[R].lower()
    assert colors == [blue, blue, orange]
    faint, strong, _ = [patch.get_alpha() for patch in axes.patches]
    assert faint < strong
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", ":", "None"][:3]
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["a", "b", "$c$", "1.00", "·", "title"]
    figure.draw_without_rendering()  # "$c$" is no formula


def test_no_token_is_cut_off():
    tokens = [Token(f" word{i}", P, numbers=("0.83", "-1.2")) for i in range(40)]
    figure = pictures.token_picture(tokens, "title", columns=60)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert -1 <= box.x0 <= box.x1 <= width + 1, text
        assert -1 <= box.y0 <= box.y1 <= height + 1, text


# ---- bars and other pictures


def test_bars_stand_on_their_start():
    rows = [Bars("Δ", [2.0, -1.0], 0.0, {"b": 0.5}), Bars("w", [1.2, 0.8], 1.0)]
    figure = pictures.bars_under_tokens([" red", "so"], [P, R], rows, "title", marked=[0])
    above, below = figure.axes
    assert [(bar.get_y(), bar.get_height()) for bar in above.patches] == [(0, 2), (0, -1)]
    heights = [bar.get_height() for bar in below.patches]
    assert heights == pytest.approx([0.2, -0.2])
    assert {bar.get_y() for bar in below.patches} == {1.0}
    assert [bar.get_hatch() for bar in above.patches] == ["////", None]
    assert [line.get_ydata()[0] for line in above.lines] == [0.0, 0.5]
    assert [text.get_text() for text in above.texts] == ["b"]
    labels = below.get_xticklabels()
    assert [label.get_text() for label in labels] == ["red", "so"]
    assert [label.get_color() for label in labels] == [pictures.COLORS[P], pictures.COLORS[R]]


def test_two_contexts_join_the_log_probs():
    figure = pictures.two_contexts(["a", "b"], [P, 0], [-1.0, -2.0], [-4.0, None])
    bars = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert bars == [[-4.0, -1.0]]  # none where there is no contrast


def test_two_contexts_show_what_step_4_cuts_off():
    others = [-8.0, -2.0] + [None] * 18
    figure = pictures.two_contexts(["a"] * 20, [P, R] * 10, [-1.0, -9.0] * 10, others, "title")
    bars = [list(line.get_ydata()) for line in figure.axes[0].lines]
    assert bars[:3] == [[-6.0, -1.0], [-8.0, -6.0], [-6.0, -6.0]]  # kept, cut off, the stroke
    assert bars[3:] == [[-4.0, -9.0], [-2.0, -4.0], [-4.0, -4.0]]  # a negative contrast
    figure.draw_without_rendering()
    legend = figure.axes[0].get_legend().get_window_extent()
    assert legend.y1 <= figure.axes[0]._left_title.get_window_extent().y0


def test_the_histogram_counts_what_is_beyond_it():
    values = {P: [-9.0, 0.0, 0.05], R: [7.0]}
    figure = pictures.histogram(values, (-0.2, 0.2), "x")
    heights = [patch.get_height() for patch in figure.axes[0].patches[:80]]
    assert sum(heights[:40]) == 3
    assert heights[0] == 1  # -9, in the first bar
    assert heights[79] == 1  # 7, in the last
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "room between the limits" in labels


def test_intervals_are_lines_with_a_dot():
    rows = [("a", -0.01, 0.0, 0.02, "k"), ("b", -0.4, -0.35, -0.3, "k")]
    axes = pictures.intervals(rows, "x").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert list(axes.lines[1].get_xdata()) == [-0.01, 0.02]
    assert len(axes.lines) == 5  # zero, and the interval and the middle of each


def test_a_forest_plot_and_what_lies_outside():
    inside = (-0.01, 0.0, 0.02)
    outside = (-0.4, -0.35, -0.3)
    rows = [
        Compared("title"),
        Compared("a", 30, (inside, outside)),
        Compared("b", 15, [inside] * 2),
    ]
    lines = [("black", -0.02, -0.03)]
    left, right = pictures.forest(rows, ["x", "y"], (-0.1, 0.1), lines, first=2).axes
    labels = [(label.get_text(), label.get_fontweight()) for label in left.get_yticklabels()]
    assert labels == [("title", "bold"), ("a", "normal"), ("b", "normal")]
    pairs = [label.get_text() for label in right.get_yticklabels()]
    assert dict(zip(right.get_yticks(), pairs, strict=True)) == {1: "30", 2: "15"}
    assert list(left.lines[1].get_xdata()) == [-0.02, -0.02]
    assert list(right.lines[1].get_xdata()) == [-0.03, -0.03]
    assert left.lines[1].get_ydata()[0] == 1.5  # from the row `first` on
    assert list(left.lines[2].get_xdata()) == [-0.01, 0.02]
    assert [text.get_text() for text in right.texts] == ["← -0.35 [-0.40, -0.30]"]
    assert len(left.lines) - len(right.lines) == 2  # an interval and its middle


def test_every_condition_of_the_study_has_its_words():
    pytest.importorskip("scipy", reason="pip install scipy")
    recorded = study.read(HERE / "study.csv")
    seen = [row for row in recorded if row["regime"] == "default" and row["seed"] < 10]
    part = study_tables.Part(seen)
    named = [name for conditions in walk.STUDY.values() for name in conditions]
    assert sorted(named) == sorted(part.others)
    rows = {row.label: row for row in walk.study_rows(part)}
    default = rows["SRPO as it is by default"]
    assert default.pairs == 30
    accuracy = np.concatenate(part.differences("srpo", "accuracy"))
    middle = np.sort(accuracy)[7:23].mean()  # the interquartile mean of 30
    low, found, high = default.found[0]
    assert found == pytest.approx(middle)
    assert low < found < high
    grey = {row.label for row in rows.values() if row.color == walk.GREY}
    assert grey == {row.label for row in rows.values() if 0 < row.pairs < 30}


def test_the_surrogate_is_clipped_at_the_same_ratios_for_every_weight():
    figure = pictures.surrogate((0.8, 1.0, 1.2), clip=0.2)
    for axes, is_flat in zip(figure.axes, (lambda x: x > 1.2, lambda x: x < 0.8), strict=True):
        for line in axes.lines:
            ratios = line.get_xdata()[1:]
            steps = np.abs(np.diff(line.get_ydata()))
            flat = steps < 1e-9
            expected = np.array([is_flat(round(x, 6)) for x in ratios])
            assert (flat == expected).sum() >= 99  # but for the bend itself


def test_images_and_their_squares():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    figure = pictures.image_grids([("t", image, [["1", "2"], ["3", "4"]])], side=2)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4"]
    corners = [patch.get_xy() for patch in axes.patches]
    assert corners == [(-0.5, -0.5), (1.5, -0.5), (-0.5, 1.5), (1.5, 1.5)]
    figure = pictures.image_table([("what", [image, image])], ["original", "p"])
    assert [len(axes.images) for axes in figure.axes] == [0, 1, 1]
    assert [axes.get_title() for axes in figure.axes] == ["", "original", "p"]
    figure = pictures.image_table([("what", [image, None])], ["original", "p"])
    assert [len(axes.images) for axes in figure.axes] == [0, 1, 0]


def test_a_corruption_without_strength_is_shown_once():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    rows, heads = walk.corrupted_rows(image, 2)
    assert heads == ["original", "p = 0.3", "p = 0.6", "p = 1.0", "no strength"]
    for text, images in rows:
        kind = text.split("\n")[0]
        results = {corrupt(image, kind, patch=2, p=p, seed=0).tobytes() for p in (0.3, 1.0)}
        gaps = [shown is None for shown in images]
        if len(results) == 1:
            assert gaps == [False, True, True, True, False], kind
        else:
            assert gaps == [False, False, False, False, True], kind


# ---- figures of a model


def test_patches_are_counted_by_visual_token():
    image = Image.new("RGB", (8, 8), "red")
    corrupted = image.copy()
    for corner in ((0, 0), (2, 0), (6, 7)):  # patches of 2 x 2 pixels, two of one visual token
        corrupted.putpixel(corner, (0, 0, 0))
    assert walk.hit_patches(image, corrupted, 2).tolist() == [[2, 0], [0, 1]]


def test_pieces_that_straddle_a_tag_have_its_role():
    pieces = ["<perception", ">a", " b</perception><", "reasoning>", "c</reasoning>"]
    pieces += ["<answer>d</answer>"]
    roles = walk.roles_of_pieces(pieces)
    assert roles.tolist() == [0, 1, 1, 0, 2, 0]
    axes = walk.pieces_picture(pieces, roles, "").axes[0]
    assert [text.get_text() for text in axes.texts] == [piece.strip() for piece in pieces]
    assert len(axes.patches) == 3
    assert walk.roles_of_pieces(pieces[:-1]).tolist() == [0] * 5


def test_an_empty_perception_leaves_a_response_to_grpo():
    roles = walk.roles_of_pieces(walk.EMPTY)[None]
    assert roles.unique().tolist() == [0, 2]
    contrasts = torch.arange(float(len(walk.EMPTY)))[None]
    assert srpo.token_weights(contrasts, roles).unique().tolist() == [1.0]
    assert parse_response("".join(walk.EMPTY)) is not None


def test_a_perception_is_exchanged_for_one_of_equal_length():
    roles = torch.tensor([[0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 1, 2], [0, 1, 2, 0], [0, 1, 1, 2]])
    ids = torch.tensor([[9, 1, 2, 8], [9, 1, 2, 8], [9, 3, 4, 8], [9, 5, 8, 9], [9, 6, 7, 8]])
    prompt = torch.tensor([0, 0, 0, 0, 1])
    mask = torch.ones(5, 4, dtype=torch.bool)
    zeros = torch.zeros(5, 4)
    batch = Namespace(roles=roles, rollout=Rollout(ids, mask, zeros, zeros, prompt))
    partners = [walk.partner(batch, row, same_question=True) for row in range(5)]
    assert partners == [2, 2, 0, None, None]  # row 1 says what row 0 says
    partners = [walk.partner(batch, row, same_question=False) for row in range(5)]
    assert partners == [4, 4, 4, None, 0]
    rollout, rows = walk.exchanged(batch, same_question=True)
    assert rows.tolist() == [True, True, True, False, False]
    assert rollout.ids[0].tolist() == [9, 3, 4, 8]
    assert rollout.ids[3:].tolist() == ids[3:].tolist()
    assert batch.rollout.ids[0].tolist() == [9, 1, 2, 8]  # the batch is left as it was


def test_made_up_words_are_found():
    fact = Fact("a1", "red", "circle")
    query = Query("count", ("red",))
    example = Example((), query.text(), "1", (fact,), query)
    text = respond(" a1 red square", " a1 red so 1", " 1")
    ends = [12, 15, 19, 26, 39]  # <perception>, a1, red, square, </perception>
    offsets = list(zip([0, *ends], [*ends, len(text)], strict=False))
    roles = torch.tensor([[0, 1, 1, 1, 0, 0, 0]])
    mask = torch.tensor([[True] * 7])
    rollout = Namespace(prompt=torch.tensor([0]), mask=mask)
    batch = Namespace(examples=[example], responses=[(text, offsets)], rollout=rollout, roles=roles)
    assert walk.made_up(batch, 0) == [3]
    assert walk.in_short(batch, 0) == " a1 red square* -> 1"
    assert walk.tokens_of(batch, 0)[0][1:4] == [" a1", " red", " square"]
    assert walk.tokens_of(batch, 0)[0][-1] == "EOS"
    other = torch.arange(7.0)[None]
    assert walk.other_context(batch, 0, other, -other)[:5] == [None, 1.0, 2.0, 3.0, None]
    batch.A = torch.tensor([0.5])
    found = walk.words(batch, other, other * 2, other * 3)
    assert found["A > 0", "true"].tolist() == [[2.0, 4.0, 0.5, 6.0]]
    assert found["A > 0", "made up"].tolist() == [[3.0, 6.0, 0.5, 9.0]]
    batch.roles[0, 1:3] = R
    kinds = {"name of a cell": 1.0, "color or shape": 2.0}
    assert walk.by_kind(batch, other, torch.tensor([True])) == kinds
    assert walk.by_kind(batch, other, torch.tensor([False])) == {}
    assert [walk.kind_of(word) for word in ("no", "so", "12")] == ['"no"', '"so"', "result"]


def test_limits_are_counted_by_hand():
    roles = torch.tensor([[1, 1, 2, 2, 0]])
    delta = torch.tensor([[1.0, 0.65, 0.10, 0.75, 0.0]])  # the example of section 5
    near = distribution.relative(delta, roles)
    assert near[0, :4].tolist() == pytest.approx([0.375, 0.025, -0.525, 0.125])
    assert distribution.share_at_limit(near[0, :4], 0.8, 1.2) == 0.5
    assert distribution.share_at_limit(near[0, :4], 0.5, 2.0) == 0
    assert distribution.relative(delta, roles, tau=5)[0, 0].item() == pytest.approx(0.075)


def test_figures_of_the_tiny_model(cache, capsys):
    assert distribution.main("--warmup-steps 120 --prompts 3 --device cpu".split()) == 0
    rows = re.findall(r"^\| (.+) \| (\S+) \|$", capsys.readouterr().out, re.MULTILINE)
    found = {name: float(value) for name, value in rows if value not in ("value", "---")}
    for role in ("perception", "reasoning"):
        spread = [found[f"delta of {role}, {percent} %"] for percent in (5, 50, 95)]
        assert spread == sorted(spread)
        assert spread[0] < spread[2]
    assert 0 < found["share of weights at a limit"] <= 1
    weights = (found["mean weight of perception"] - 1, found["mean weight of reasoning"] - 1)
    assert weights[0] * weights[1] < 0  # what one role gains, the other loses
    assert list(found) == list(distribution.REAL_135M)  # shown beside each other
    assert list(found) == list(distribution.REAL_135M_SEEING)
    assert distribution.main(["--model", "nowhere/at-all"]) == 2
    assert capsys.readouterr().err.startswith("error: --model nowhere/at-all")
