"""The demo's folder: made anew where a demo made it, and left alone where somebody else did."""

from pathlib import Path

import pytest

from pentimento.errors import UserError
from pentimento.pocket import demo


def test_a_folder_of_an_earlier_demo_is_made_anew(tmp_path: Path) -> None:
    for _ in range(2):
        demo._clear(tmp_path / "demo")
        assert [path.name for path in (tmp_path / "demo").iterdir()] == [demo.MARKER]
        (tmp_path / "demo" / "sheet.png").write_text("of the demo before")


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_what_no_demo_has_made_is_left_alone(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "demo"
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        demo._clear(tmp_path / "elsewhere")
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "thesis.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="move it away or rename it"):
        demo.main(out)
    assert sorted(tmp_path.rglob("*")) == before
