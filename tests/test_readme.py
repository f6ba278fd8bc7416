"""The README's commands, as they stand there, on small images."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from tests.conftest import REPOSITORY


def photos(root: Path) -> None:
    """A folder per class, of digits enlarged to 40 x 40 pixels."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = root / ("test" if number % 4 == 0 else "train") / f"digit{label}"
        folder.mkdir(parents=True, exist_ok=True)
        if number < 240:
            Image.fromarray((pixels * 15.9).astype("uint8")).resize((40, 40)).save(folder / f"{number}.jpg")


def test_the_commands_of_the_readme(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    for name in ("tools", "configs", "launcher"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    # Sizes that two CPU cores manage in seconds; nothing else of what the reader types is changed.
    script = "set -e\n" + "\n".join(blocks).replace("resnet50", "small_cnn").replace("size: 224", "size: 32").replace(
        "--seeds 2", "--seeds 1"
    )
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no problems" in done.stdout
    assert "16 rank(s)" in done.stdout
    assert "with 2 rank(s), written by 1" in done.stdout
    assert "labels are probably wrong" in done.stdout
    assert '"key","path","given","suggested","p_clean","margin","rank"' in done.stdout
    assert "labels replaced by what runs/mine suggests" in done.stdout


def test_links_and_files_that_the_readme_names_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (REPOSITORY / target).exists(), target
    for target in re.findall(r"^make (\w+)$", text, re.MULTILINE):
        assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
