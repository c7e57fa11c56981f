"""One question about one image."""

from __future__ import annotations

from PIL import Image

from virft_fast import try_model
from virft_fast.data import load_rows
from virft_fast.rollout.native import NativeRollout


def test_the_answer_is_printed_and_its_boxes_are_drawn(tmp_path, capsys, monkeypatch):
    row = load_rows("shapes_detection", split="test")[3]
    row["image"].save(tmp_path / "shape.png")
    monkeypatch.chdir(tmp_path)
    question = row["problem"].removeprefix("<image>").strip()
    assert try_model.main(["tiny", "shape.png", question]) == 0
    answer, written = capsys.readouterr().out.rstrip().rsplit("\n\n", 1)
    assert "'Position'" in answer and "'Confidence'" in answer
    assert written.startswith("written: shape-answer.png; boxes: 1")
    assert try_model.main(["tiny", "shape.png", question]) == 0
    assert "\nreplaced: shape-answer.png" in capsys.readouterr().out
    assert try_model.main(["tiny", "shape.png", question, "--output", "shape.png"]) == 2
    assert "expected another file than the image" in capsys.readouterr().err
    drawn, image = Image.open("shape-answer.png"), Image.open("shape.png")
    assert drawn.size == image.size and drawn.tobytes() != image.convert("RGB").tobytes()


def test_boxes_need_no_confidences_and_an_answer_needs_no_boxes(tmp_path, capsys, monkeypatch):
    Image.new("RGB", (112, 56), "white").save(tmp_path / "page.png")
    answers = iter(["(100,200),(500,900)", "a cat"])
    generate = NativeRollout.generate

    def canned(self, prompts, *arguments, **options):
        rollouts = generate(self, prompts, *arguments, **options)
        object.__setattr__(rollouts, "texts", (next(answers),))
        return rollouts

    monkeypatch.setattr(NativeRollout, "generate", canned)
    out = tmp_path / "boxes"
    asked = ["tiny", str(tmp_path / "page.png"), "Where?", "--max_completion_length", "2"]
    assert try_model.main([*asked, "--output", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "(100,200),(500,900)" in shown and "boxes: 1" in shown
    assert "cut off at --max_completion_length 2" in shown
    pink = Image.open(out).getpixel((11, 30))  # the left edge, at 100 of 1000
    assert pink[0] > 200 and pink[1] < 120
    out.unlink()
    assert try_model.main([*asked, "--output", str(out)]) == 0
    assert "no boxes in the answer" in capsys.readouterr().out and not out.exists()


def test_what_cannot_be_used_is_a_usage_error(tmp_path, capsys):
    assert try_model.main(["tiny", str(tmp_path / "none.png"), "What?"]) == 2
    assert "none.png" in capsys.readouterr().err
    Image.new("RGB", (56, 56)).save(tmp_path / "black.png")
    nowhere = str(tmp_path / "none" / "out.png")
    assert try_model.main(["tiny", str(tmp_path / "black.png"), "?", "--output", nowhere]) == 2
    assert "--output" in capsys.readouterr().err
    assert try_model.main([str(tmp_path / "no_model"), str(tmp_path / "black.png"), "What?"]) == 2
    assert "no_model" in capsys.readouterr().err
