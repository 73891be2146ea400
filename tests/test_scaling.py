"""The early filter on a method whose best seed is known, with judges good, bad and absent."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from toy import Toy

from pentimento import scaling, schema
from pentimento.errors import UserError
from pentimento.judges import Verdict
from pentimento.method import EditSettings, Example
from pentimento.run import Editor
from pentimento.scaling import Found, Question, Search
from pentimento.schema import Origin

SOURCE = Image.new("RGB", (8, 6), "white")
QUALITY = {10: 30, 11: 80, 12: 50, 13: 200, 14: 120}
"""Grey levels that seeds give; brighter is better."""


class Bright:
    """Prefers the brighter candidate, and writes down what it was shown."""

    name = "bright"

    def __init__(self) -> None:
        self.shown: list[tuple[int, int]] = []

    def compare(
        self, source: Image.Image, first: Image.Image, second: Image.Image, instruction: str
    ) -> Verdict:
        assert (source, instruction) == (SOURCE, "brighter")
        levels = first.getpixel((0, 0))[0], second.getpixel((0, 0))[0]
        self.shown.append(levels)
        return Verdict(choice=1 if levels[0] > levels[1] else 2, reason="brighter", raw="{}")


class Silent(Bright):
    """Has no answer to some of the questions."""

    def __init__(self, *failing: int):
        super().__init__()
        self.failing = failing

    def compare(self, *arguments) -> Verdict:
        verdict = super().compare(*arguments)
        if len(self.shown) in self.failing:
            return Verdict(choice=None, reason=f"no answer to question {len(self.shown)}")
        return verdict


class First(Bright):
    """Has no eyes: it always names what it is shown first."""

    def compare(self, *arguments) -> Verdict:
        return replace(super().compare(*arguments), choice=1)


class Drawn:
    """Edits that are counted: how bright depends on the seed, and one level on having enough steps."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int | None]] = []

    def __call__(self, seed: int, steps: int | None) -> Image.Image:
        self.made.append((seed, steps))
        return Image.new("RGB", (8, 6), (QUALITY[seed] + (steps != 2),) * 3)


def find(judge, edit=None, *, steps: int | None = None, final: int | None = 50, **settings) -> Found:
    search = Search(**{"candidates": 5, "early_steps": 2} | settings)
    question = Question(source=SOURCE, instruction="brighter")
    return scaling.search(edit or Drawn(), question, judge, search, seed=10, steps=steps, final=final)


def test_the_best_seed_wins_and_is_made_again_in_all_steps() -> None:
    edit, judge = Drawn(), Bright()
    found = find(judge, edit)
    assert edit.made == [(10, 2), (11, 2), (12, 2), (13, 2), (14, 2), (13, None)]
    assert judge.shown == [(30, 80), (80, 50), (80, 200), (200, 120)]
    assert found.seed == 13
    assert found.picture.getpixel((0, 0)) == (201,) * 3
    assert {seed: p.getpixel((0, 0))[0] for seed, p in found.previews.items()} == QUALITY
    assert found.function_evaluations == 50 + 5 * 2
    assert (found.failures, found.warning()) == (0, None)


def test_the_steps_of_the_final_edit_are_passed_on() -> None:
    edit = Drawn()
    assert find(Bright(), edit, steps=7, final=7).function_evaluations == 17
    assert edit.made[-1] == (13, 7)
    assert find(Bright(), final=None).function_evaluations is None


def test_a_candidate_of_as_many_steps_is_the_result() -> None:
    edit = Drawn()
    found = find(Bright(), edit, steps=2, final=2)
    assert len(edit.made) == 5
    assert found.picture is found.previews[13]
    assert found.function_evaluations == 5 * 2


def test_a_question_without_answer_keeps_the_champion_and_is_told() -> None:
    found = find(Silent(3))
    assert [c.winner for c in found.comparisons] == [11, 11, 11, 14]
    assert [c.failure for c in found.comparisons] == [None, None, "no answer to question 3", None]
    assert found.seed == 14
    warning = found.warning()
    assert warning is not None and "1 of 4 comparisons" in warning and "no answer to question 3" in warning


def test_a_judge_that_never_answers_leaves_the_first_seed() -> None:
    judge = Silent(1, 2, 3, 4)
    found = find(judge)
    assert len(judge.shown) == 4
    assert found.seed == 10
    assert found.picture.getpixel((0, 0)) == (31,) * 3
    assert found.trace()["failures"] == 4
    assert "4 of 4 comparisons" in str(found.warning())


def test_asking_both_ways_sees_through_a_judge_that_goes_by_order() -> None:
    assert find(First()).seed == 10
    judge = First()
    found = find(judge, judge_order="both")
    assert judge.shown[:2] == [(30, 80), (80, 30)]
    assert found.seed == 10
    assert found.failures == 0
    assert find(Bright(), judge_order="both").seed == 13
    # One failed answer of the two is no agreement.
    half = find(Silent(6), judge_order="both")
    assert [c.winner for c in half.comparisons] == [11, 11, 11, 14]


def test_the_trace_is_complete_and_json_able() -> None:
    trace = json.loads(json.dumps(find(Silent(2), judge_order="both").trace()))
    assert trace["seeds"] == [10, 11, 12, 13, 14]
    assert (trace["early_steps"], trace["steps"], trace["function_evaluations"]) == (2, 50, 60)
    assert (trace["judge"], trace["winner"], trace["failures"]) == ("bright", 13, 1)
    first = trace["comparisons"][0]
    assert (first["champion"], first["challenger"], first["winner"]) == (10, 11, 10)
    assert first["answers"] == [
        {"shown": [10, 11], "choice": 2, "reason": "brighter", "raw": "{}"},
        {"shown": [11, 10], "choice": None, "reason": "no answer to question 2", "raw": ""},
    ]
    assert len(trace["comparisons"]) == 4


def test_the_sheet_shows_source_and_candidates() -> None:
    sheet = find(Bright()).sheet(SOURCE)
    assert sheet.width > 6 * 128


def test_more_early_steps_than_final_ones_and_single_candidates_are_refused() -> None:
    with pytest.raises(UserError, match="early_steps=10 is more than the 4 steps"):
        find(Bright(), early_steps=10, final=4)
    with pytest.raises(UserError, match="two or more"):
        find(Bright(), candidates=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"early_steps": 0}, "early_steps must be at least 1"),
        ({"judge": "exact"}, "ask for two or more"),
        ({"candidates": 2, "judge": "htpp"}, "Did you mean http?"),
        ({"candidates": 2.5}, "should be a whole number"),
        ({"judge_timeout": 0}, "judge_timeout must lie between"),
        ({"judge_order": "random"}, "one of fixed, both"),
    ],
)
def test_wrong_settings_explain_themselves(settings: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        schema.parse(Search, settings, Origin(name="edit"))
    assert words in str(error.value)


def test_without_a_judge_the_judges_are_listed() -> None:
    with pytest.raises(UserError) as error:
        Search(candidates=6).open_judge()
    for words in ("candidates=6", "judge=http", "judge=local", "judge=exact", "OPENAI_BASE_URL"):
        assert words in str(error.value)


class Seeded(Toy):
    """Its pictures are as bright as ``QUALITY`` says; it takes four steps by itself."""

    def edit(self, example: Example, settings: EditSettings) -> Image.Image:
        assert example.source is not None and example.prompt == "brighter"
        steps = settings.steps or 4
        return Image.new(
            "RGB", example.source.size, (int(QUALITY[settings.seed] * settings.scale) + steps,) * 3
        )

    def metadata(self) -> dict:
        return {"steps": 4}


def test_an_editor_searches_with_any_method(tmp_path: Path) -> None:
    editor = Editor(method=Seeded(), default_instruction="brighter")
    search = Search(candidates=5, early_steps=2, judge="exact")
    found = editor.search(SOURCE, search=search, judge=Bright(), seed=10)
    assert (found.seed, found.function_evaluations) == (13, 4 + 5 * 2)
    assert found.picture.tobytes() == editor.edit(SOURCE, seed=13).tobytes()
    assert found.previews[11].tobytes() == editor.edit(SOURCE, seed=11, steps=2).tobytes()
    SOURCE.save(tmp_path / "a.png")
    weak = editor.search(
        tmp_path / "a.png",
        instruction="brighter",
        search=search,
        judge=Anything(),
        seed=10,
        steps=2,
        scale=0.5,
    )
    assert weak.picture is weak.previews[10]
    assert weak.picture.getpixel((0, 0)) == (17,) * 3
    with pytest.raises(UserError, match="needs a judge"):
        editor.search(SOURCE, search=Search(candidates=2))


class Anything:
    name = "anything"

    def compare(self, source, first, second, instruction) -> Verdict:
        return Verdict(choice=1, reason="")
