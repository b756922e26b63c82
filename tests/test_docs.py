"""README, model card and docs/: short enough, no dead links, and every command works, in the order a reader meets them.

A block that needs more than this repository says so in the sentence before it, as in "(GPU needed)". Such blocks are
checked but not run.
"""
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.run import get_args_parser

import bench
import export
import hub
import train
import visualize
from tests.common import HERE, TINY, free_port, write_images

README = (HERE / "README.md").read_text()
DOCS = re.findall(r"\]\((docs/\w+\.md)\)", README)  # in the order in which the README sends its readers there
PAGES = ["README.md", *DOCS, "MODEL_CARD.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    page: str
    language: str
    text: str
    needs: str  # "GPU needed", "download needed", …; if empty, the block is run


def read(page: str) -> str:
    return (HERE / page).read_text()


def blocks(page: str) -> list[Block]:
    text, found = read(page), []
    for match in FENCE.finditer(text):
        before = text[: match.start()].strip().split("\n\n")[-1].replace("\n", " ")
        needs = re.search(r"\(([^()]*\bneeded\b[^()]*)\)", before)
        found.append(Block(page, match[1], match[2], needs[1] if needs else ""))
    return found


ALL_BLOCKS = [block for page in PAGES for block in blocks(page)]


def prose(page: str) -> str:
    return FENCE.sub("", read(page))


class Command(NamedTuple):
    page: str
    script: str  # train.py, support/sources.py
    argv: list[str]
    n_processes: int  # of torchrun; 0: started by python


def as_commands(page: str, text: str) -> list[Command]:
    """The commands in a block or a code span; those of pip and pytest left out."""
    lines = [part.strip() for line in text.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    found = []
    for launcher, *words in (shlex.split(line, comments=True) for line in lines if line):
        if words[:1] == ["-m"] and words[1].startswith("support."):
            words = [words[1].replace(".", "/") + ".py", *words[2:]]
        if launcher in ("python", "torchrun") and (scripts := [w for w in words if re.fullmatch(r"[\w/]+\.py", w)]):
            at = words.index(scripts[0])
            launch = get_args_parser().parse_args([*words[:at], scripts[0]]) if launcher == "torchrun" else None
            n = int(launch.nproc_per_node) * int(launch.nnodes.split(":")[0]) if launch else 0
            found.append(Command(page, scripts[0], words[at + 1 :], n))
    return found


def commands_of(block: Block) -> list[Command]:
    return as_commands(block.page, block.text) if block.language == "sh" else []


TYPED = [c for block in ALL_BLOCKS for c in commands_of(block)]
SPANS = [c for page in PAGES for span in re.findall(r"`((?:python|torchrun) [^`]+)`", prose(page).replace("\n", " "))
         for c in as_commands(page, span)]


def program(script: str):
    if script.startswith("kernels/"):  # no package: loaded by path
        spec = importlib.util.spec_from_file_location("attention", HERE / script)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        return module
    return importlib.import_module(script[:-3].replace("/", "."))


@functools.cache
def flags_of(script: str, subcommand: str = "") -> frozenset[str]:
    """The flags that --help shows."""
    if script == "bench.py" and subcommand not in ("", *bench.TRAINING):
        subcommand = ""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        program(script).main([*([subcommand] if script in SUBCOMMANDS else []), "--help"])
    lines = re.findall(r"^ {2,}(-.*)$", text.getvalue(), re.MULTILINE)
    flags = {flag for line in lines for flag in re.findall(r"--[a-z][\w-]*", line)}
    return frozenset(flags | (flags_of("train.py") if subcommand in bench.TRAINING else set()))


SUBCOMMANDS = {"hub.py": ("info",), "export.py": tuple(export.COMMANDS),
               "visualize.py": tuple(visualize.COMMANDS)}


# ----------------------------------------------------------------------------------------------------------------------
# Form


def test_docs_readme_is_short():
    """250 lines, picture first, each command of the first minutes once, each page linked once."""
    assert len(README.splitlines()) <= 250 and README.splitlines()[2].startswith("![")
    assert [i for i, line in enumerate(README.splitlines(), 1) if len(line) > 250] == []
    for command in ("pip install -r requirements.txt && python train.py",
                    "pip install -r requirements.txt pytest && python -m pytest -q"):
        assert README.splitlines().count(command) == 1
    assert sorted(DOCS) == sorted(f"docs/{p.name}" for p in (HERE / "docs").glob("*.md"))
    assert README.count("(MODEL_CARD.md)") == README.count("(CITATION.cff)") == README.count("(LICENSE)") == 1


def test_docs_readme_names_every_file():
    """The table of files has all programs and no others."""
    named = set(re.findall(r"`([\w/]+\.py)`", README.partition("## Read the code")[2].partition("\n## ")[0]))
    here = {str(p.relative_to(HERE)) for folder in (".", "support") for p in (HERE / folder).glob("*.py")}
    assert named == here - {"conftest.py"}


def test_docs_readme_table_of_models():
    """Names, parameters and registers of the released models, and entry points that torch.hub has."""
    rows = re.findall(r"^\| `(dinov2_\w+)` \| ([\d,]+) M \| (\S+) \| (.*)$", README, re.MULTILINE)
    assert [name for name, *_ in rows] == list(hub.RELEASED)
    exact = dict(re.findall(r"^\| `(\w+)` .* ([\d,]+) \|$", read("MODEL_CARD.md"), re.MULTILINE))
    points = hub.entry_points()
    for name, millions, registers, rest in rows:
        with torch.device("meta"):
            backbone = points[name](pretrained=False)
        n = sum(p.numel() for p in backbone.parameters())
        assert f"{n:,}" == exact[name] and f"{n / 1e6:,.0f}" == millions
        assert registers == (str(backbone.num_register_tokens) if backbone.num_register_tokens else "–")
        for head in re.findall(r"`(\w+)`", rest):
            assert head in points or name + head in points, head


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_docs_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (HERE / page).parent / name if name else HERE / page
        assert target.is_file(), link
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), link


@pytest.mark.parametrize("page", PAGES)
def test_docs_flags_exist(page):
    """Flags of a command exist in its program; flags in prose in one of the programs that the page names."""
    for command in (c for c in TYPED + SPANS if c.page == page):
        flags = flags_of(command.script, command.argv[0] if command.argv else "")
        given = {word.partition("=")[0] for word in command.argv if word.startswith("--")}
        assert given <= flags | {"--help"}, command
    named = {name for name in re.findall(r"\b(?:support/|kernels/)?\w+\.py\b", read(page)) if (HERE / name).is_file()}
    known = set().union(*(flags_of(name, sub) for name in named | {"train.py"} if name in PROGRAMS
                          for sub in SUBCOMMANDS.get(name, ("",))))
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}
    known |= set(re.findall(r"(--[a-z][\w-]*)", " ".join(b.text for b in blocks(page) if b.language == "bash")))
    spans = re.findall(r"`(--[a-z][\w-]*)[^`]*`", prose(page))
    assert not {span for span in spans if span not in known}


PROGRAMS = {"train.py", "export.py", "hub.py", "visualize.py", "bench.py", "support/sources.py", "kernels/attention.py",
            "eval_knn.py", "eval_logreg.py", "eval_linear.py", "eval_dense.py"}


def test_docs_commands_parse():
    """The programs accept the presets, choices and numbers of all commands, run or not."""
    assert {command.script for command in TYPED} >= PROGRAMS - {"kernels/attention.py"}
    for command in TYPED + SPANS:
        if command.script not in PROGRAMS:
            raise AssertionError(f"{command.page}: there is no {command.script}")
        if "--help" in command.argv:
            continue
        if command.script == "train.py":
            train.check(train.parse(command.argv)[0], max(command.n_processes, 1))
        elif command.script.startswith("eval_") or command.script in ("bench.py", "visualize.py"):
            program(command.script).parse(command.argv)


def output_of(command: Command) -> str:
    """What a command writes that another could overwrite. Results of evaluations are appended to a file."""
    argv = command.argv
    if "--help" in argv:
        return ""
    if command.script == "train.py":
        return train.parse(argv)[0].out
    if command.script == "visualize.py":
        return visualize.parse(argv).out
    if command.script == "export.py":
        return argv[argv.index("--out") + 1] if "--out" in argv else argv[2 if argv[0] == "convert" else 1]
    return ""


def test_docs_no_two_examples_share_an_output():
    writers = {}
    for command in TYPED + SPANS:
        if out := output_of(command):
            writers.setdefault(out, set()).add((command.script, *command.argv))
    assert {out: commands for out, commands in writers.items() if len(commands) > 1} == {}


def test_docs_promises_name_tests():
    files = [HERE / "test_all.py", *(HERE / "tests").glob("test_*.py")]
    tests = {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = re.findall(r"`(test_\w+)`", read("docs/promises.md"))
    assert len(named) > 30 and not {*named} - tests


def test_docs_python_compiles():
    for block in ALL_BLOCKS:
        if block.language in ("python", "py"):
            compile(block.text, block.page, "exec")


# ----------------------------------------------------------------------------------------------------------------------
# Running


SHORT = {  # appended to a command's own flags, which these override
    "train.py": [*map(str, TINY), "--steps", "4"],
    "eval_linear.py": ["--epochs", "1", "--epoch-length", "2"],
    "eval_dense.py": ["--steps", "2", "--eval-every", "2", "--batch-size", "2", "--num-workers", "0"],
    "support/sources.py": ["--num-workers", "0"],
}
SMALL_NET = ["--arch", "vit_nano", "--batch-size", "4", "--group-size", "4", "--head-n-prototypes", "64",
             "--head-hidden-dim", "8", "--head-bottleneck-dim", "8", "--device", "cpu", "--repeats", "1"]
SHORT_BENCH = {"train": [*SMALL_NET, "--num-workers", "0"], "heads": SMALL_NET, "attention": SMALL_NET, "scale": [],
               "save": ["--preset", "digits", "--repeats", "1"], "data": ["--repeats", "1"], "gpu": [],
               "hub": ["--name", "dinov2_vits14", "--repeats", "1"], "dense": ["--dim", "8", "--repeats", "1"],
               "knn": ["--images", "200", "--queries", "50", "--dim", "8", "--repeats", "1"],
               "logreg": ["--images", "500", "--dim", "8", "--every", "45"], "linear": ["--dim", "8", "--repeats", "1"]}
LONG = ("bench.py", "eval_dense.py", "eval_linear.py")


def shortened(command: Command) -> list[str]:
    if "--help" in command.argv:
        return command.argv
    short = SHORT_BENCH[command.argv[0]] if command.script == "bench.py" else SHORT.get(command.script, [])
    if command.script == "eval_linear.py" and "--cached" in command.argv:
        short = ["--epochs", "1"]
    return [{"/my/photos": "my_photos"}.get(word, word) for word in command.argv] + short


def execute(command: Command) -> None:
    """Runs the command in this process, those of torchrun in new ones."""
    argv = shortened(command)
    if command.n_processes:
        out = Path(argv[argv.index("--out") + 1]).absolute()
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", command.n_processes, "--master-port", free_port()]
        subprocess.run([str(word) for word in (sys.executable, *launch, command.script, *argv, "--out", out)], cwd=HERE,
                       check=True)
        return
    if "hf" in argv and importlib.util.find_spec("safetensors") is None:
        return
    try:
        program(command.script).main(argv)
    except SystemExit as done:
        assert not done.code, command
    finally:
        torch.use_deterministic_algorithms(False)  # which --deterministic turned on
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def execute_pages(skip: tuple[str, ...], pages: tuple[str, ...] = ()) -> None:
    """Runs all blocks of these pages, or of all, that need nothing else, page after page, so that each file exists
    before it is used. With `skip`, neither these programs nor torchrun."""
    write_images(Path("my_photos"), ["a.png", "b/c.png"])
    for block in (b for b in ALL_BLOCKS if not b.needs and (not pages or b.page in pages)):
        if block.language == "python":
            first = re.match(r"# (\w+\.py)\n", block.text)  # the reader saves this block as a file
            Path(first[1]).write_text(block.text) if first else exec(block.text, {"__name__": "block"})
            for file in list(Path("pairs").rglob("*_[1-9]*_*.png")):  # one row of each photograph is enough
                file.unlink()
        for command in commands_of(block):
            if command.script not in skip and not (skip and command.n_processes):
                execute(command)


def test_docs_commands_of_the_readme_run(desk, capsys):
    execute_pages(skip=LONG, pages=("README.md",))
    assert Path("out/ckpt.pth").stat().st_size > 100


@pytest.mark.slow
def test_docs_all_commands_run(desk, capsys):
    execute_pages(skip=())
    written = ["out/ckpt.pth", "out_photos/ckpt.pth", "features.npz", "out/vit.pt2", "curves.png", "pca.png",
               "visualize-neighbors.png", "visualize-similarity.png", "depth.png", "segment.png"]
    assert [name for name in written if not Path(name).stat().st_size > 100] == []
    assert {p.name for p in Path("out_photos").glob("ckpt.*_head.pth")} == {
        f"ckpt.{name}_head.pth" for name in ("depth_linear", "depth_linear4", "depth_dpt", "seg_linear", "seg_ms")}
