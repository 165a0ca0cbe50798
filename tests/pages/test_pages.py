"""Pages: what they hold, against figures counted by hand and in fp64; and in a real browser."""

import base64
import json
import math
import re
import shutil

import pytest
import torch
from click.testing import CliRunner

import fastmerge
from fastmerge.checkpoint import Checkpoint
from fastmerge.cli import main
from fastmerge.errors import OutputError, RecipeError
from fastmerge.pages import merge, search
from fastmerge.pages.document import Document
from fastmerge.pages.overlap import measure, together
from tests import tiny

GENES = [
    {"name": f"{m}/{g}/weight", "model": m, "group": g, "parameter": "weight", "low": -1, "high": 1}
    for g in ("layers.0-1", "layers.2-3")
    for m in ("math", "code")
] + [{"name": "merge_method", "parameter": "merge_method", "choices": ["ties", "linear"]}]


def record(number, generation, genes, scores, items=40):
    return {
        "number": number, "generation": generation, "genes": genes, "scores": scores, "items": items, "seconds": 0.1,
    }  # fmt: skip


EVALUATIONS = [
    record(0, 0, [0.5, 0.5, 0.25, 0.1, "ties"], {"skill": 0.4, "short": 0.9}),
    record(1, 0, [0.7, -0.2, 0.5, 0.3, "linear"], {"skill": 0.75, "short": 0.2}, items=20),
    record(2, 1, [0.7, -0.2, 0.5, 0.3, "linear"], {"skill": 0.7, "short": 0.25}),
    record(3, 1, [0.1, 0.2, 0.3, 0.4, "ties"], {"skill": None, "short": None}),
]


@pytest.fixture
def searched(tmp_path):
    """A search of two objectives, in the files that searches write."""
    place = tmp_path / "search"
    place.mkdir()
    facts = {
        "version": 1, "method": "ties", "models": ["/models/math", "/models/code"], "genes": GENES,
        "objectives": ["skill", "short"], "sampler": "genetic", "seed": 3, "items": {"search": 40, "held_out": 10},
        "recipe": {},
    }  # fmt: skip
    (place / "search.json").write_text(json.dumps(facts))
    (place / "evaluations.jsonl").write_text("".join(json.dumps(e) + "\n" for e in EVALUATIONS))
    return place


def finish(place):
    result = {
        "best": 2, "scores": {"skill": 0.7, "short": 0.25}, "held_out": {"skill": 0.62, "short": 0.3},
        "baselines": {"<b>math</b>": {"skill": 0.55, "short": 0.1}}, "front": [0, 2],
    }  # fmt: skip
    (place / "result.json").write_text(json.dumps(result))
    (place / "best.yml").write_text("merge_method: linear  # <script>alert(1)</script>\n")


def images(html):
    return [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)]


def test_a_search(searched, tmp_path):
    finish(searched)
    made = search.page(searched)
    html = made.html()
    assert list(made.figures) == ["scores-skill", "scores-short", "front-skill-short", "heat-weight"]
    assert len(images(html)) == 4
    assert all(image.lstrip().startswith("<?xml") for image in images(html))
    assert "best, on 10 held-out items</td><td>0.62" in html
    assert "&lt;b&gt;math&lt;/b&gt;, on held-out items</td><td>0.55" in html
    assert "<script" not in html, "texts are escaped"
    assert "merge_method</td><td>linear</td>" in html, "what is no number stands in a table"
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert search.page(searched).html() == html, "the same files make the same page"
    made.write(tmp_path / "page.html", tmp_path / "png")
    assert (tmp_path / "page.html").read_text() == html
    heads = {p.name: p.read_bytes()[:8] for p in (tmp_path / "png").iterdir()}
    assert heads == {f"{name}.png": b"\x89PNG\r\n\x1a\n" for name in made.figures}


def test_the_best_so_far_counts_scores_on_all_items(searched):
    axes = search.page(searched).figures["scores-skill"].axes[0]
    line = next(one for one in axes.lines if one.get_label() == "best so far")
    assert list(line.get_xdata()) == [0, 1]
    assert list(line.get_ydata()) == [0.4, 0.7], "0.75 was on half of the items"


def test_the_heat_map_has_the_best_ones_genes(searched):
    finish(searched)
    axes = search.page(searched).figures["heat-weight"].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.7, -0.2], [0.5, 0.3]]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["layers.0-1", "layers.2-3"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["math", "code"]


def test_a_search_under_way(searched):
    with (searched / "evaluations.jsonl").open("a") as file:
        file.write('{"number": 4, "gene')  # while it is written
    assert "4 evaluations by genetic, seed 3, 5 genes; still under way" in search.page(searched).html()
    (searched / "evaluations.jsonl").write_text("")
    assert "No candidate has been evaluated yet" in search.page(searched).html()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("search.json", "{", "search.json: damaged"),
        ("search.json", "[]", "expected a mapping, got list"),
        ("search.json", "{}", "not the files of a search: KeyError"),
        ("evaluations.jsonl", "nothing\n", "evaluations.jsonl:1: damaged"),
        ("evaluations.jsonl", '{"number": 1}\n', "not the files of a search"),
    ],
)
def test_damaged_files_are_refused(searched, name, text, said):
    (searched / name).write_text(text)
    with pytest.raises(OutputError, match=said):
        search.page(searched)


@pytest.fixture
def merged(tmp_path):
    """A base, three fine-tunes and their TIES merge."""
    base = tiny.state(0)
    tiny.write(tmp_path / "base", base)
    for i, name in enumerate(("math", "code", "chat"), 1):
        tiny.write(tmp_path / name, tiny.state(i, base=base))
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [
            {"model": str(tmp_path / name), "parameters": {"density": 0.3, "weight": 1.0}}
            for name in ("math", "code", "chat")
        ],
        "parameters": {"normalize": True},
    }
    fastmerge.merge(recipe, tmp_path / "out", device="cpu")
    return tmp_path


def loaded(path):
    from safetensors.torch import load_file

    return {n: t.double() for n, t in load_file(path / "model.safetensors").items()}


def test_figures_of_a_merge(merged):
    states = [loaded(merged / n) for n in ("base", "math", "code", "chat", "out")]
    opened = [Checkpoint.open(merged / n) for n in ("base", "math", "code", "chat", "out")]
    got = measure(opened[0], opened[1:4], opened[4])
    assert got.keys() == states[0].keys()
    for name, found in got.items():
        base, *others = (s[name].flatten() for s in states)
        deltas = torch.stack([x - base for x in others])
        gram = deltas @ deltas.T
        assert torch.allclose(torch.from_numpy(found.gram), gram, rtol=1e-12, atol=1e-18)
        assert math.isclose(found.base, float(base @ base), rel_tol=1e-12)
        assert found.kept == int((others[-1] != base).sum())
        up, down = (deltas[:3] > 0).any(0), (deltas[:3] < 0).any(0)
        assert found.conflict == int((up & down).sum())
    whole = together(list(got.values()))
    assert 0.3 < whole.kept / whole.numel < 0.7, "three times 0.3 of the elements, some of them the same"
    assert whole.cosine(0, 1) == pytest.approx(0, abs=0.02), "independent fine-tunes"
    assert whole.cosine(0, 3) > 0.3


def test_nan_is_left_out(tmp_path):
    base = {"w": torch.ones(8)}
    tuned, result = torch.full((8,), 2.0), torch.full((8,), 1.5)
    tuned[3] = math.nan
    for name, t in (("base", base["w"]), ("tuned", tuned), ("out", result)):
        tiny.write(tmp_path / name, {"w": t})
    opened = [Checkpoint.open(tmp_path / n) for n in ("base", "tuned", "out")]
    found = measure(opened[0], [opened[1]], opened[2])["w"]
    assert found.gram.tolist() == [[7.0, 3.5], [3.5, 1.75]]
    assert found.base == 7
    assert found.kept == 8


def test_a_merge(merged):
    made = merge.page(merged / "out")
    html = made.html()
    assert list(made.figures) == ["length", "taken", "agreement", "shares"]
    lines = {line.get_label() for line in made.figures["taken"].axes[0].lines}
    assert lines == {"math", "code", "chat"}
    assert "Sign conflict:" in html
    assert "ties of math, code, chat over base; 21 of 21 tensors are in all of them" in html
    assert "density: 0.3" in html


def test_what_has_no_page_is_refused(merged):
    with pytest.raises(OutputError, match="is missing"):
        merge.page(merged / "base")
    recipe = {"merge_method": "linear", "models": [{"model": str(merged / n), "parameters": {"weight": 1}}
                                                    for n in ("math", "code")]}  # fmt: skip
    fastmerge.merge(recipe, merged / "mean", device="cpu")
    with pytest.raises(RecipeError, match="linear has no base_model"):
        merge.page(merged / "mean")


def test_the_command(merged, searched, tmp_path):
    out = tmp_path / "made.html"
    done = CliRunner().invoke(main, ["page", str(merged / "out"), "--out", str(out), "--png", str(tmp_path / "png")])
    assert done.output == f"wrote {out} and 4 figures in {tmp_path / 'png'}\n"
    assert out.read_text().startswith("<!doctype html>")
    assert CliRunner().invoke(main, ["page", str(searched), "--out", str(out)]).exit_code == 0
    refused = CliRunner().invoke(main, ["page", str(merged / "base"), "--out", str(out)])
    assert refused.exit_code == 4
    assert "expected the directory of a search" in refused.output
    refused = CliRunner().invoke(main, ["page", str(searched), "--out", str(tmp_path / "no/where.html")])
    assert refused.exit_code == 4


@pytest.mark.page
@pytest.mark.parametrize("kind", ["search", "merge"])
def test_in_a_browser(searched, merged, tmp_path, kind):
    """Nothing on the console, and every figure has a size."""
    from playwright.sync_api import sync_playwright

    finish(searched)
    made: Document = search.page(searched) if kind == "search" else merge.page(merged / "out")
    made.write(tmp_path / "page.html")
    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": 900})
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((tmp_path / "page.html").as_uri())
        sizes = tab.eval_on_selector_all(
            "img", "images => images.map(i => [i.id, i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
        )
        wide = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        shot = tmp_path / f"{kind}.png"
        tab.screenshot(path=shot, full_page=True)
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert [name for name, *_ in sizes] == list(made.figures)
    assert all(complete and natural > 100 and shown > 100 for _, complete, natural, shown in sizes)
    assert wide <= 0, "nothing sticks out"
    assert shot.stat().st_size > 10_000
