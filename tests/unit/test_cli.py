"""Settings from YAML and the command line: precedence, help, and one-line errors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from protopnet.cli import Positional, Repeated, changed_settings, nearest, parse
from protopnet.config import RunSettings, Section
from protopnet.errors import UserError


class Inner(Section):
    """The inner part."""

    depth: int = Field(3, ge=1, le=9, description="depth in metres")
    ratio: float = Field(0.5, gt=0, lt=1, description="share of something, 100 % at most")
    shape: tuple[int, int] = Field((1, 1), description="height and width")


class Job(Section):
    """Does a job."""

    bundle: Positional[str] = Field(description="folder of the bundle")
    images: Positional[list[str]] = Field([], description="image files")
    kind: Literal["big", "small"] = Field("big", description="which kind")
    names: int | list[str] | None = Field(None, description="how many, or which")
    quiet: bool = Field(False, description="say nothing")
    inner: Inner = Inner()

    @field_validator("bundle")
    @classmethod
    def _not_x(cls, value: str) -> str:
        if value == "x":
            raise ValueError("a bundle can't be called x")
        return value


def write(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text)
    return str(path)


def message(argv: list[str], settings_class: type[Section] = Job) -> str:
    with pytest.raises(UserError) as caught:
        parse(settings_class, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults() -> None:
    assert parse(RunSettings, []) == RunSettings()


def test_command_line_over_yaml_over_default(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: small\ninner:\n  depth: 5\n  ratio: 1e-1\n")
    settings = parse(Job, ["b", "--config", path, "--inner.depth=7"])
    assert (settings.kind, settings.inner) == ("small", Inner(depth=7, ratio=0.1))


def test_later_file_wins(tmp_path: Path) -> None:
    first = write(tmp_path, "inner: {depth: 5, ratio: 0.2}")
    second = tmp_path / "second.yaml"
    second.write_text("inner.depth: 6")
    settings = parse(Job, ["b", "--config", first, "--config", str(second)])
    assert settings.inner == Inner(depth=6, ratio=0.2)


def test_a_file_wins_over_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("kind: small\ninner: {depth: 5, ratio: 2}\n")
    path = write(tmp_path, "extends: base.yaml\ninner: {depth: 6}\n")
    expected = f"inner.ratio: 2 in {tmp_path / 'base.yaml'} is not valid; expected a number, above 0, below 1"
    assert message(["b", "--config", path]) == expected
    settings = parse(Job, ["b", "--config", path, "--inner.ratio", "0.1"])
    assert settings == Job(bundle="b", kind="small", inner=Inner(depth=6, ratio=0.1))


def test_a_file_that_extends_itself_or_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: settings.yaml")
    assert message(["b", "--config", path]) == f"--config {path}: it extends itself; change extends"
    path = write(tmp_path, "extends: nope.yaml")
    assert message(["b", "--config", path]) == f"--config {tmp_path / 'nope.yaml'}: there is no such file"


def test_empty_files_and_sections(tmp_path: Path) -> None:
    assert parse(Job, ["b", "--config", write(tmp_path, "")]) == Job(bundle="b")
    assert parse(Job, ["b", "--config", write(tmp_path, "inner:\n  # depth: 3\n")]) == Job(bundle="b")


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("3", 3),
        ("null", None),
        ("a,b", ["a", "b"]),
        ("a, b", ["a", "b"]),
        ('["1", "b"]', ["1", "b"]),
        ('["a,b"]', ["a,b"]),
        ("wren", ["wren"]),
    ],
)
def test_values_of_a_union(given: str, value: object) -> None:
    assert parse(Job, ["b", "--names", given]).names == value


@pytest.mark.parametrize("given", ["2,3", "[2,3]", "[2, 3]"])
def test_tuples(given: str) -> None:
    assert parse(Job, ["b", "--inner.shape", given]).inner.shape == (2, 3)


@pytest.mark.parametrize("given", ["-0.08", "-8e-2", "-.08"])
def test_negative_numbers(given: str) -> None:
    assert parse(RunSettings, ["--train.separation", given]).train.separation == -0.08


class Fence(Section):
    """Bars patches."""

    forbid: Annotated[list[str], Repeated("IMAGE:BOX")] = Field([], description="bar a patch")


def test_repeated_options_keep_their_commas(tmp_path: Path) -> None:
    assert parse(Fence, ["--forbid", "a,b.jpg:1,2,3,4", "--forbid=c:all"]).forbid == ["a,b.jpg:1,2,3,4", "c:all"]
    assert parse(Fence, []).forbid == []
    assert parse(Fence, ["--config", write(tmp_path, 'forbid: ["a:1,2,3,4"]')]).forbid == ["a:1,2,3,4"]


def test_dashes_are_underscores() -> None:
    given = ["--train.batch-size", "7", "--data.max-bad=0.5", "--name", "--not-a-setting-but-a-value".lstrip("-")]
    settings = parse(RunSettings, given)
    assert (settings.train.batch_size, settings.data.max_bad, settings.name) == (7, 0.5, "not-a-setting-but-a-value")


def test_texts_stay_as_they_are() -> None:
    settings = parse(RunSettings, ["--storage", "s3://b/a,b=[c]", "--name", "123"])
    assert (settings.storage, settings.name) == ("s3://b/a,b=[c]", "123")


def test_switches() -> None:
    assert parse(Job, ["--quiet", "--kind", "small", "b"]).quiet is True
    assert parse(Job, ["b", "--quiet", "false"]).quiet is False


def test_positional_arguments_between_options() -> None:
    settings = parse(Job, ["b", "--kind", "small", "one.jpg", "two.jpg", "--inner.depth", "2"])
    assert (settings.bundle, settings.images, settings.inner.depth) == ("b", ["one.jpg", "two.jpg"], 2)


def test_positional_from_yaml(tmp_path: Path) -> None:
    assert parse(Job, ["--config", write(tmp_path, "bundle: b")]).bundle == "b"


def test_missing_positional() -> None:
    assert message([]) == "BUNDLE is missing: folder of the bundle"


def test_unexpected_argument() -> None:
    assert message(["vgg19"], RunSettings) == "unexpected argument 'vgg19'; expected settings as --name value"


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--model.backbon", "--model.backbone"),
        ("--backbone", "--model.backbone"),
        ("--train.lr-addon", "--train.lr_add_on"),
        ("--confg", "--config"),
        ("--model.back", "--model.backbone"),
    ],
)
def test_unknown_option(option: str, meant: str) -> None:
    assert message([option, "x"], RunSettings) == f"unknown setting {option}; did you mean {meant}?"


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "inner:\n  dept: 3\n")
    assert message(["b", "--config", path]) == f"unknown setting inner.dept in {path}; did you mean inner.depth?"


def test_unknown_section_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "iner:\n  depth: 3\n")
    assert message(["b", "--config", path]).startswith(f"unknown setting iner in {path}; did you mean inner")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--inner.depth", "12"], "inner.depth: 12 is not valid; expected a whole number, at least 1, at most 9"),
        (["--inner.depth", "deep"], "inner.depth: deep is not valid; expected a whole number, at least 1, at most 9"),
        (["--inner.ratio", "1"], "inner.ratio: 1 is not valid; expected a number, above 0, below 1"),
        (["--kind", "huge"], "kind: huge is not valid; expected one of big, small"),
        (["--quiet", "maybe"], "quiet: maybe is not valid; expected true or false"),
        (["--names", "[1"], "names: [1 is not valid; expected a whole number or a list (a,b,c) or null"),
        (["--inner.shape", "1,2,3"], "inner.shape: 1,2,3 is not valid; expected 2 whole numbers such as 1,1"),
        (["--inner.depth"], "--inner.depth: expected a value after it"),
        (["--kind", "x", "--inner.depth", "0"], "kind: x is not valid; expected one of big, small (and 1 more)"),
        (["--kin", "x", "--inner.dep", "0"], "unknown setting --kin; did you mean --kind? (and 1 more)"),
    ],
)
def test_invalid_options(argv: list[str], expected: str) -> None:
    assert message(["b", *argv]) == expected


def test_own_validators_speak_for_themselves() -> None:
    assert message(["x"]) == "bundle: a bundle can't be called x"
    expected = "data.path is missing: where are the images of data.source cub?"
    assert message(["--data.source", "cub"], RunSettings) == expected


def test_invalid_value_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "names: [1, 2]\n")
    expected = f"names: 1,2 in {path} is not valid; expected a whole number or a list (a,b,c) or null"
    assert message(["b", "--config", path]) == expected


def test_a_section_that_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, "inner: 3\n")
    assert message(["b", "--config", path]).startswith(f"inner: 3 in {path} is no group of settings")
    assert parse(Job, ["b", "--config", path, "--inner.depth", "4"]).inner.depth == 4


@pytest.mark.parametrize(
    ("text", "problem"),
    [("- a\n- b\n", "found a list"), ("vgg19", "found a single value"), ("a: b: c", "not valid YAML at line 1")],
)
def test_files_that_are_no_settings(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, text)
    found = message(["b", "--config", path])
    assert path in found
    assert problem in found


def test_missing_file(tmp_path: Path) -> None:
    assert message(["--config", "nope.yaml"]) == "--config nope.yaml: there is no such file"
    assert "can't be read" in message(["--config", str(tmp_path)])


def help_text(settings_class: type[Section], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        parse(settings_class, ["--help"], description="Does it.\n\n    like this")
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(Job, capsys)
    for part in (
        "BUNDLE [IMAGES …] [--config FILE.yaml] [--setting value …]",
        "Does it.\n\n    like this\n",
        "inner:\n  The inner part.\n",
        "--inner.depth N\n      depth in metres (at least 1, at most 9; default: 3)\n",
        "--kind big|small\n      which kind (default: big)\n",
        "share of something, 100 % at most (above 0, below 1; default: 0.5)",
        "--inner.shape N,N\n      height and width (default: 1,1)\n",
        "--names N|A,B,…\n      how many, or which (default: null)\n",
    ):
        assert part in text


def test_help_names_every_setting_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(RunSettings, capsys)

    def options(section: type[Section], prefix: str = "") -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from options(inner, f"{prefix}{name}.")
            else:
                yield prefix + name

    for option in options(RunSettings):
        assert f"  --{option} " in text
    assert "Optional" not in text
    assert "NoneType" not in text


def test_nearest() -> None:
    assert nearest("resnet81", ["vgg19", "resnet18", "densenet121"]) == "resnet18"
    assert nearest("anything", []) == ""


def test_changed_settings() -> None:
    old = {"name": "a", "model": {"backbone": "vgg16", "shape": [1, 1]}, "gone": 1}
    new = {"name": "a", "model": {"backbone": "vgg19", "shape": (1, 1)}, "train": {"new": 2}}
    assert changed_settings(old, new) == [
        ("model.backbone", "vgg16", "vgg19"),
        ("gone", 1, "(not set)"),
        ("train.new", "(not set)", 2),
    ]
    assert changed_settings(old, old) == []
