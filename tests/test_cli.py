import logging
import subprocess
import sys
from pathlib import Path

import pytest

from nldist.cli import main
from nldist.errors import show_messages
from tests.conftest import REPOSITORY

DIGITS = str(REPOSITORY / "tests" / "digits.yaml")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that ends with code 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_dry_run_says_what_would_happen(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dry-run", DIGITS, f"data.root={digits}", "train.batch_size=64", "--world-size", "3"]) == 0
    text = capsys.readouterr().out
    assert "1,437 samples in 5 shards; labels: sym50" in text
    assert "44." in text or "45." in text, "half drawn at random from ten classes: about 45 % wrong"
    assert "net0: 8 steps of 64 all images per rank" in text  # ceil(1437 / (64 * 3))
    assert "net1: at most 15 steps of 32 labelled + 32 unlabelled images per rank" in text
    # loss 4, clean 4, predicted 2 bytes, for each network; suggested 2
    assert "22 bytes per sample" in text
    assert "activations of 128 images" in text


def test_dry_run_tells_of_every_stage(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"data.root={digits}", f"run.dir={tmp_path}/run", "method.name=scanmix", "--world-size", "2"]
    assert main(["dry-run", DIGITS, *arguments]) == 0
    text = capsys.readouterr().out
    stages = [line.split()[1] for line in text.splitlines() if line.startswith("stage ")]
    assert stages == ["pretext", "mine", "cluster", "train"]
    assert "net0: 6 steps of 128 all images per rank" in text  # ceil(1437 / (128 * 2))
    assert "search: 4 steps without images" in text
    # 5 % kept apart: ceil(1365 / (64 * 2))
    assert "cluster0: at most 11 steps of 64 anchors + 64 neighbours images per rank" in text
    assert f"{4 * 16 + 8 * (10 + 8)} bytes per sample" in text, "features and candidates while mining"
    assert not (tmp_path / "run").exists()


def test_dry_run_measures_what_the_backward_pass_keeps(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def activations(*overrides: str) -> int:
        main(["dry-run", DIGITS, f"data.root={digits}", *overrides])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
        return int(line.split("optimiser + ")[1].split(" MiB")[0].replace(",", ""))

    small, large = activations("train.batch_size=256"), activations("train.batch_size=512")
    assert small > 0
    assert large == pytest.approx(2 * small, rel=0.1)


def test_dry_run_counts_every_copy_of_the_weights(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fixed(*overrides: str) -> int:
        arguments = [f"data.root={digits}", "model.name=preact_resnet18", "--world-size", "4", *overrides]
        assert main(["dry-run", DIGITS, *arguments]) == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
        return int(line.split("about ")[1].split(" MiB")[0])

    # Of each network weights, gradients, momentum.
    one = fixed("method.dividemix.peers=sequential") / 6
    for copies, overrides in (
        (7, []),  # and network 0 as it was
        (8, ["method.dividemix.peers=sequential", "train.ema_decay=0.99"]),
        (8, ["method.dividemix.peers=sequential", "optim.name=lamb"]),
        # weights whole, and a quarter of gradients, momentum and master weights
        (2 * (1 + 3 / 4), ["method.dividemix.peers=sequential", "engine.name=deepspeed", "engine.zero_stage=2"]),
    ):
        assert fixed(*overrides) / one == pytest.approx(copies, abs=0.05), overrides


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data.root=nowhere"], "nowhere"),
        (["engine.name=deepspeed", "engine.config=nowhere.json"], "engine.config nowhere.json cannot be read"),
        (["data.label_set=sym99"], "sym50"),
        (["data.eval_split=tset"], "tset"),
        (["data.test_split=tset"], "tset"),
        (["data.test_split=test"], "it is eval_split, too"),
        (["model.name=preact_resnet81"], "preact_resnet18"),
        (["train.epoch=3"], "train.epochs"),
        (["method.tau=0.6"], "method.dividemix.tau"),
        (["method.dividemix.warmup_epochs=99"], "warmup_epochs"),
        (["dist.device=cuda"], "dist.device=cpu"),
        (["data.cache_dir=/proc/nowhere"], "data.cache_dir=/proc/nowhere cannot be made"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(
    arguments: list[str], words: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "train", DIGITS, f"data.root={digits}", f"run.dir={tmp_path}/run", *arguments)
    assert line.startswith("error: ")
    assert words in line


def test_directories_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no config.yaml" in refused(capsys, "evaluate", str(tmp_path))
    assert "no summary.json" in refused(capsys, "compare", str(tmp_path))
    assert "tracked with MLflow" in refused(capsys, "sync", str(tmp_path))


@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_reader_that_has_enough_ends_the_command_without_a_word(num_lines: int) -> None:
    program = f"""
import sys
from nldist.errors import main_guard

@main_guard
def main():
    sys.stdin.read()
    for number in range({num_lines}):
        print(number)

sys.exit(main())
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_what_modules_tell_is_printed_on_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("nldist.somewhere")
    for is_main, told in ((True, "INFO WARNING"), (False, "WARNING")):
        show_messages(is_main)
        log.info("INFO")
        log.warning("WARNING")
        assert capsys.readouterr().out.split() == told.split()
