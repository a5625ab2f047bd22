"""A run's page is right whatever state the run is in, whatever its rows say, in a browser of any width and
colour."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from run_facts import make_facts

from qwenlora.adapter.publish import curves
from qwenlora.adapter.publish.report import ANSWERS, write_report
from qwenlora.adapter.publish.run_summary import LORA_SETTINGS
from qwenlora.adapter.publish.series import read_curves
from qwenlora.configs.schema import Lora
from qwenlora.run.folder import RunFolder
from qwenlora.run.records import Paces
from qwenlora.slurm import query
from qwenlora.slurm.query import JobInfo

ZERO = 1_790_000_000.0  # 2026-09-21 14:13:20 UTC
HOSTILE = [
    "<script>console.error('ran')</script>",
    "</pre></details></div><img src=http://example.org/x.png onerror=console.error('ran')>",
    "\"quotes\" 'single' & &amp; {{ 7 * 7 }} {% raw %} $x^2$",
    "\u202emirrored \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "word" * 300,
    "\x00\x07\x1b[31mred\x7f\x9b",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f600 你好",
    "x" * 10_000,
]


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """Return a run folder with its config alone."""
    folder = RunFolder(tmp_path / "my run")
    folder.path.mkdir()
    folder.config.write_text(
        "model: {name_or_path: tiny}\nlora: {r: 32}\ntrain: {max_steps: 100}\ndata: {train: a.jsonl}\n"
    )
    return folder


def attempt(number, first, last, reason="done", **more):
    at = [time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(ZERO + 600 * number + s)) for s in (0, 500)]
    times = {"start": at[0], "end": at[1], "trained_s": 400.0, "saving_s": 1.0}
    steps = {"first_step": first, "last_step": last, "steps_repeated": 0}
    return (
        {"attempt": number, "processes": 4, "nodes": ["a", "b"], "reason": reason, "message": ""}
        | times
        | steps
        | more
    )


def log(run, attempts=(), steps=range(1, 101), **columns):
    """Write metrics.jsonl. columns: {name: value of a step}."""
    columns = {
        "loss": lambda step: 8 / step,
        "grad_norm": lambda step: 1.0,
        "time": lambda step: ZERO + step,
    } | columns
    lines = [{"step": step} | {name: of(step) for name, of in columns.items()} for step in steps]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.history.file.write_text("".join(json.dumps(line) + "\n" for line in attempts))


def comparison(texts=("a",), **more):
    answers = [
        {
            "set": "training",
            "question": text,
            "reference": text,
            "answers": ["", text],
            "right": [False, True],
        }
        for text in texts
    ]
    measures = [
        {
            "set": "training",
            "measure": "exact",
            "kind": "share",
            "better": "higher",
            "count": 9,
            "values": [0.0, 0.5],
        },
        {
            "set": "own",
            "measure": "perplexity",
            "kind": "number",
            "better": "lower",
            "count": 9,
            "values": [5.5, None],
        },
    ]
    subjects = [{"label": "base", "adapter": None}, {"label": "<b>my run", "adapter": "adapter", "own": True}]
    whole = {
        "made": "2026-01-01T00:00:00+00:00",
        "seed": 0,
        "subjects": subjects,
        "measures": measures,
        "answers": answers,
    }
    return whole | more


class Page(HTMLParser):
    """What a parser makes of the page: its tags, its text, and what it would load or link."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        write_report(run)
        self.source = (run.path / "report.html").read_text(encoding="utf-8")
        self.tags, self.links, self.pieces = [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "srcset", "action")]
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())


def test_the_ranks_are_shown_with_their_own_times_and_who_is_slow(run):
    log(run, [attempt(1, 1, 100)], rank_forward_s=lambda _: 0.1, slowest_rank_forward_s=lambda _: 0.2)
    seconds = [0.1 + 0.001 * rank for rank in range(20)]
    paces = Paces(
        step=100, hosts=[f"n{rank}" for rank in range(20)], seconds=seconds, slow=["rank 19 is <slow>"]
    )
    run.paces.write_text(paces.text())
    page = Page(run)
    assert (
        "rank node own time of a step of the median 19 n19 119.0 ms 1.09 18 n18 118.0 ms 1.08 " in page.text
    )
    assert " 5 n5 105.0 ms 0.96 0 n0 100.0 ms 0.92 Comparison" in page.text, "15 slowest, and the fastest"
    assert "rank 19 is <slow>" in page.text
    assert (run.path / "report-slowest_rank_forward_s.png").is_file()
    run.begin_attempt(1)
    assert "own time" not in Page(run).text, "it has other ranks"


def test_a_real_run_is_written_up_with_its_curves_in_the_page_and_beside_it(tiny_run, tmp_path):
    run = RunFolder(shutil.copytree(tiny_run[0], tmp_path / "tiny"))
    page = Page(run)
    names = {"loss", "learning_rate", "grad_norm", "tokens_per_s", "peak_memory_gb", "progress"}
    assert page.tags.count("svg") == 6
    assert {file.name for file in run.path.glob("*.png")} == {f"report-{name}.png" for name in names}
    assert Image.open(run.path / "report-loss.png").size == (920, 560)
    for said in (
        "done",
        "of 120, 20 epochs",
        "goodput",
        "622,592 parameters beside the base's 3,672,576 (14.50% of all)",
        "training evaluation lowest",
    ):
        assert said in page.text
    assert "AutoPeftModelForCausalLM.from_pretrained('tiny/adapter')" in page.text
    assert "wandb sync tiny/wandb/offline-run-*" in page.text
    assert "qwenlora compare tiny" in page.text
    assert run.config.read_text() in "".join(page.pieces)
    assert str(tmp_path) not in page.source


def test_every_setting_of_lora_is_shown():
    assert set(LORA_SETTINGS) == {f"lora.{key}" for key in Lora.model_fields}


def test_the_page_loads_nothing_and_runs_nothing(run):
    log(run, [attempt(1, 1, 100)])
    run.wandb_id.parent.mkdir()
    run.wandb_id.write_text("abc123")
    run.wandb_id.with_name("url").write_text("https://wandb.example/me/project/runs/abc123\n")
    page = Page(run)
    assert [link for link in page.links if not link.startswith("#")] == [
        "https://wandb.example/me/project/runs/abc123"
    ]
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.source
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", page.source)), "of clip paths"
    assert "@import" not in page.source
    run.wandb_id.with_name("url").write_text("javascript:alert(1)")
    assert "javascript" not in Page(run).source


def test_hostile_rows_answers_and_names_are_shown_as_text(run):
    log(run, [attempt(1, 1, 100, "failed", message=HOSTILE[1], cause="<i>")])
    run.config.write_text(json.dumps({"data": {"train": HOSTILE[0]}, "model": {"name_or_path": HOSTILE[1]}}))
    run.write_facts(make_facts(notes=HOSTILE, bad_rows=1))
    run.bad_rows.write_text("\n".join(HOSTILE))
    run.code.write_text(json.dumps({"command": HOSTILE, "git": "<b>", "versions": {"<u>": "1"}}))
    file = run.path / "comparison.json"
    file.write_text(json.dumps(comparison(HOSTILE, made="<i>")))
    page = Page(run)
    assert not set(page.tags) & {"script", "img", "i", "u"}, page.tags
    assert page.text.count("<script>console.error('ran')</script>") >= 5
    assert "{{ 7 * 7 }}" in page.text
    assert "␀␇␛[31mred" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page.source)
    assert f"{'x' * 2000} ... (8,000 more characters)" in page.text
    assert "x" * 2001 not in page.text


def test_right_and_wrong_and_the_best_are_told_by_more_than_colour(run):
    (run.path / "comparison.json").write_text(json.dumps(comparison()))
    text = Page(run).text
    assert "base ✗ wrong (nothing)" in text
    assert "<b>my run ✓ right a" in text
    assert "exact 9 0.0% ★ 50.0% higher" in text
    assert "perplexity 9 5.5 - lower" in text, "alone it is not the best"


def test_of_many_answers_some_are_shown_evenly_spread(run):
    (run.path / "comparison.json").write_text(
        json.dumps(comparison([f"question {n}." for n in range(4 * ANSWERS)]))
    )
    text = Page(run).text
    assert f"training , side by side: {ANSWERS} of {4 * ANSWERS}, all are in comparison.json" in text
    for number in range(4 * ANSWERS):
        assert (f"question {number}." in text) == (number % 4 == 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        '{"subjects": []',
        "[" * 100_000,
        '{"subjects": "\\ud800"}',
        json.dumps(comparison(subjects=[])),
        json.dumps(comparison(format=2)),
    ],
)
def test_a_damaged_comparison_is_a_line_on_the_page(run, text):
    (run.path / "comparison.json").write_text(text)
    page = Page(run)
    assert "comparison.json cannot be read: " in page.text


def test_other_damaged_files_are_lines_on_the_page_too(run):
    for file in (run.facts, run.code, run.history.file):
        file.write_text('{"half": ')
    run.config.write_text("a: [")
    page = Page(run)
    for name in ("facts.json", "code.json", "attempts.jsonl", "config.yaml"):
        assert f"{name} cannot be read: " in page.text
    run.history.file.write_text('{"attempt": 1}\n')
    run.facts.write_text("[]")
    page = Page(run)
    assert "attempts.jsonl cannot be read: start: Field required" in page.text
    assert "facts.json cannot be read: Input should be an object" in page.text


def test_a_run_that_has_not_begun_was_refused_or_has_logged_nothing_has_a_page(run):
    page = Page(run)
    assert "not started" in page.text
    assert "No step has been logged yet." in page.text
    assert page.tags.count("svg") == 0
    refused = {"attempt": 1, "start": "2026-01-01T00:00:00+00:00", "processes": 1}
    refused |= {
        "end": "2026-01-01T00:00:09+00:00",
        "reason": "refused",
        "message": "train.max_steps=0: too few",
    }
    run.history.file.write_text(json.dumps(refused) + "\n")
    assert "refused : train.max_steps=0: too few 2026-01-01 00:00 UTC" in Page(run).text


def test_a_run_under_way_says_how_long_ago_its_last_step_was(run):
    log(run, steps=range(1, 8))
    with run.metrics.open("a") as file:
        file.write('{"step": 8, "los')
    run.begin_attempt(2)
    run.history.note(first_step=1)
    run.history.progress.write(1, 7, 5.0, 0.1)
    text = Page(run).text
    assert "running : step 7 was done 0 s ago" in text
    assert "steps 7 of 100" in text


def test_a_stopped_run_whose_job_is_pending_waits_to_go_on(run, monkeypatch):
    log(run, steps=range(1, 8))
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    run.begin_attempt(2)
    run.end_attempt("stopped", "SIGUSR1")
    monkeypatch.setattr(query, "ask", lambda job_id: JobInfo(job_id, "PENDING"))
    assert "waits to go on : SIGUSR1" in Page(run).text


def test_what_was_planned_is_beside_what_was_measured(run):
    plan = {"device": "H100", "kind": "ddp", "step_s": 3.5, "tokens_s": 1100.0, "memory": 20 * 10**9}
    columns = {"tokens_per_s": lambda step: 1000.0, "peak_memory_gb": lambda step: 21.0}
    log(run, [attempt(1, 1, 100, strategy="ddp", planned=plan)], **columns)
    text = Page(run).text
    assert "throughput 1,000 tokens/s (median), planned 1,100" in text
    assert "a step 4.00 s (the last attempt's mean), planned 3.50" in text
    assert "peak memory 21.00 GB on the first rank, planned 20.00" in text
    log(run, [attempt(1, 1, 100, strategy="ddp")], **columns)
    assert "planned" not in Page(run).text


def test_numbers_that_are_not_finite_are_noted_and_marked(run):
    log(run, loss=lambda step: float("nan") if step % 10 == 0 else 1.0, grad_norm=lambda step: float("inf"))
    text = Page(run).text
    assert "loss is not finite 10 times, first at step 10" in text
    assert "Crosses: not a finite number." in text
    assert "training loss NaN" in text.replace("nan", "NaN")
    assert not (run.path / "report-grad_norm.png").exists(), "there is nothing to draw"


def test_an_evaluation_that_has_risen_since_is_noted(run):
    log(run, [attempt(1, 1, 100)], eval_loss=lambda step: 1 + abs(step - 40) / 100)
    text = Page(run).text
    assert "the evaluation loss has risen since step 40, from 1 to 1.6; checkpoint-40 is not there" in text
    assert "at step 100; lowest 1 at 40" in text


def test_restarts_are_marked_and_listed_with_what_was_repeated(run):
    again = attempt(2, 41, 80, "killed", steps_repeated=10, resumed_from="checkpoint-40", cause="PREEMPTED")
    log(run, [attempt(1, 1, 50, "stopped", message="SIGTERM"), again, attempt(3, 81, 100)])
    page = Page(run)
    assert "10 steps were trained again after a restart" in page.text
    assert "2 09-21 14:33 8 min 20 s killed 40 41 to 80 10 4 2 PREEMPTED" in page.text
    assert "Dashed: where another attempt went on; shaded: steps that it trained again." in page.text
    loss = curves.draw_charts(read_curves(run.metrics), run.history.attempts())[0]
    marks = [line for line in loss.figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in marks] == [41, 81]


def test_a_folder_without_a_run_and_a_name_that_is_taken_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="holds no run: config.yaml is not there; name a run folder"):
        write_report(RunFolder(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no name of a page"):
        write_report(run, run.config)
    taken = tmp_path / "mine.html"
    taken.write_text("my own")
    with pytest.raises(ValueError, match="is there and is no report; choose another name"):
        write_report(run, taken)
    assert taken.read_text() == "my own"
    with pytest.raises(ValueError, match="cannot write .*; --html names another place"):
        write_report(run, taken / "report.html")


def test_the_page_goes_where_it_is_asked_to_and_is_written_again(run, tmp_path):
    log(run)
    page = tmp_path / "pages" / "my.html"
    for _ in range(2):
        assert write_report(run, page) == f"wrote {page}, its 3 figures beside it as my-*.png"
    assert {file.name for file in page.parent.iterdir()} == {
        *("my.html", "my-loss.png", "my-grad_norm.png", "my-progress.png")
    }
    assert not list(run.path.glob("report*"))


def test_a_hundred_thousand_lines_make_a_small_page_that_shows_every_spike(run):
    random = np.random.default_rng(0).normal(size=100_001)
    spike = {54_321: 900.0}
    log(
        run,
        [attempt(n + 1, 2000 * n + 1, 2000 * n + 2000) for n in range(50)],
        steps=range(1, 100_001),
        loss=lambda step: 3 + random[step] / 10,
        grad_norm=lambda step: spike.get(step, 1 + abs(random[step])),
        learning_rate=lambda step: 1e-4,
    )
    before = time.process_time()
    write_report(run)
    assert time.process_time() - before < 10
    assert (run.path / "report.html").stat().st_size < 1_000_000
    norm = next(
        c for c in curves.draw_charts(read_curves(run.metrics), []) if c.name == "grad_norm"
    ).figure.axes[0]
    assert norm.get_yscale() == "log"
    assert norm.collections[0].get_paths()[0].vertices[:, 1].max() == 900


def test_a_start_needs_no_torch(run):
    log(run)
    code = (
        "import sys; from qwenlora.adapter.publish.report import write_report; from qwenlora.run.folder"
        " import RunFolder;"
    )
    code += (
        "write_report(RunFolder(sys.argv[1])); print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, run.path], capture_output=True, text=True, check=True
    )
    assert answer.stdout == "False False\n"
    assert answer.stderr == ""


@pytest.mark.slow
def test_an_error_in_the_console_would_be_seen(browse, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<script>missing()</script><meta http-equiv='Content-Security-Policy' content=\"img-src 'none'\"><img"
        " src=x>"
    )
    lines, _ = browse(page)
    assert any("missing is not defined" in line for line in lines)
    assert any("Content Security Policy" in line for line in lines)


@pytest.mark.slow
def test_the_page_opens_without_an_error_in_light_and_dark(browse, tiny_run, tmp_path):
    page = tmp_path / "tiny.html"
    write_report(RunFolder(tiny_run[0]), page)
    backgrounds = {}
    for dark in (False, True):
        lines, picture = browse(page, dark=dark)
        assert not lines
        backgrounds[dark] = picture.getpixel((5, 5))
        used = {colour for _, colour in picture.getcolors(2**24)}
        for name in ("first", "second"):  # the curves, in the colours of the scheme
            assert tuple(bytes.fromhex(curves.COLOURS[name][dark][1:])) in used
    assert min(backgrounds[False]) > 240
    assert max(backgrounds[True]) < 40


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_no_text_makes_the_page_wider_than_the_screen(browse, run, tmp_path, width):
    log(
        run,
        [attempt(n, 10 * n - 9, 10 * n, "failed", message=HOSTILE[4], job_id="123456") for n in range(1, 11)],
    )
    run.config.write_text(json.dumps({"data": {"train": HOSTILE[4]}, "model": {"name_or_path": HOSTILE[7]}}))
    run.write_facts(make_facts(notes=HOSTILE, bad_rows=1))
    run.bad_rows.write_text("\n".join(HOSTILE))
    run.code.write_text(json.dumps({"command": HOSTILE, "git": "a" * 400}))
    (run.path / "comparison.json").write_text(json.dumps(comparison(HOSTILE)))
    write_report(run)
    inner = html.escape((run.path / "report.html").read_text(encoding="utf-8"))
    # in a frame: a window cannot be as narrow as a phone
    outer = tmp_path / "outer.html"
    script = "const d = document.querySelector('iframe').contentDocument;"
    script += "for (const one of d.querySelectorAll('details')) one.open = true;"
    script += "console.log('width ' + d.documentElement.scrollWidth)"
    frame = (
        f'<iframe width={width} height=1000 style="border:0" srcdoc="{inner}"'
        f' onload="{html.escape(script)}"></iframe>'
    )
    outer.write_text(f"<meta charset=utf-8>{frame}", encoding="utf-8")
    lines, _ = browse(outer)
    assert len(lines) == 1, lines
    assert f'"width {width}"' in lines[0]
