"""Recipes: what a file may say, whom a rule means, and what is wrong with a bad one."""

from pathlib import Path

import pytest

from requant.errors import OutOfRangeError, UsageError
from requant.quantization.config import SKIP, Quantization
from requant.quantization.options import ConvertOptions
from requant.quantization.recipe_files import (
    load_recipe,
    parse_recipe,
    recipe_names,
    recipe_text,
    to_toml,
)
from requant.quantization.recipes import LayerTarget
from requant.quantization.roles import ROLES

AFFINE = Quantization.affine
PATHS = [
    "model.embed_tokens",
    *(
        f"model.layers.{n}.{layer}"
        for n in range(12)
        for layer in ("self_attn.v_proj", "mlp.gate", "mlp.down_proj", "mlp.experts.3.down_proj")
    ),
    "vision_tower.blocks.1.attn.qkv",
    "lm_head",
]


def choose(text: str, base: Quantization | None = None) -> dict[str, LayerTarget]:
    return parse_recipe(text, "mine").choose(PATHS, base)


def rule(text: str) -> set[str]:
    """Whom a single rule means."""
    return set(choose(f"[[rules]]\nspec = 8\n{text}\n"))


# -- whom a rule means -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("role", "paths"),
    [
        ("embedding", ["model.embed_tokens", "transformer.wte", "tok_embeddings"]),
        ("head", ["lm_head", "language_model.lm_head", "output"]),
        ("attention", ["layers.0.self_attn.q_proj", "h.0.attn.c_attn"]),
        ("q_proj", ["l.0.self_attn.q_proj", "l.0.self_attn.q_a_proj", "l.0.attention.wq"]),
        ("k_proj", ["l.0.self_attn.k_proj"]),
        ("v_proj", ["l.0.self_attn.v_proj"]),
        ("o_proj", ["l.0.self_attn.o_proj", "l.0.attention.out_proj"]),
        ("gate_proj", ["l.0.mlp.gate_proj", "l.0.feed_forward.w1"]),
        ("up_proj", ["l.0.mlp.up_proj"]),
        ("down_proj", ["l.0.mlp.switch_mlp.down_proj", "l.0.experts.7.w2", "h.0.mlp.c_proj"]),
        ("experts", ["l.0.mlp.experts.7.up_proj", "l.0.mlp.switch_mlp.up_proj"]),
        ("shared_experts", ["l.0.mlp.shared_experts.up_proj", "l.0.mlp.shared_expert.up_proj"]),
        ("router", ["l.0.mlp.gate", "l.0.mlp.router", "l.0.mlp.shared_expert_gate"]),
    ],
)
def test_roles(role: str, paths: list[str]) -> None:
    recipe = parse_recipe(f'[[rules]]\nrole = "{role}"\nspec = 8', "mine")
    others = ["model.norm", "l.0.mlp.gate_up", "l.0.attn_output", "l.0.attention.output.dense"]
    assert set(recipe.choose([*paths, *others], None)) - set(paths) <= {
        "l.0.attention.output.dense"
    }
    assert set(paths) <= set(recipe.choose(paths, None))


def test_no_role_goes_untested() -> None:
    marks = test_roles.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(ROLES)


def test_experts_are_not_shared_experts() -> None:
    recipe = parse_recipe('[[rules]]\nrole = "experts"\nspec = 3', "mine")
    assert recipe.choose(["l.0.mlp.shared_experts.up_proj", "l.0.mlp.gate"], None) == {}


def test_match_is_searched_in_the_path() -> None:
    assert rule("match = 'layers\\.1\\.'") == {p for p in PATHS if ".layers.1." in p}


def test_first_and_last_count_blocks_of_each_stack() -> None:
    blocks = {p.split(".")[2] for p in rule("first = 1\nlast = 2") if p.startswith("model.layers")}
    assert blocks == {"0", "10", "11"}
    assert "vision_tower.blocks.1.attn.qkv" in rule("last = 1")  # block 1 of 2
    assert "vision_tower.blocks.1.attn.qkv" not in rule("first = 1")
    assert not {"model.embed_tokens", "lm_head"} & rule("first = 99")


def test_all_conditions_of_a_rule_must_hold() -> None:
    found = rule('role = ["down_proj", "v_proj"]\nmatch = "mlp"\nfirst = 1')
    assert found == {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts.3.down_proj"}


def test_the_last_rule_that_fits_wins() -> None:
    text = """
        [[rules]]
        role = "down_proj"
        spec = 6
        [[rules]]
        role = "experts"
        spec = "skip"
    """
    found = choose(text)
    assert found["model.layers.3.mlp.down_proj"] == LayerTarget(AFFINE(64, 6), True, 1)
    assert found["model.layers.3.mlp.experts.3.down_proj"] == LayerTarget(SKIP, True, 2)


def test_a_rule_that_only_counts_blocks_points_at_no_kind_of_layer() -> None:
    assert not choose("[[rules]]\nfirst = 1\nspec = 8")["model.layers.0.mlp.gate"].explicit


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("8", AFFINE(32, 8)),
        ('"8"', AFFINE(32, 8)),
        ('"8:128"', AFFINE(128, 8)),
        ('"mxfp4"', Quantization(32, 4, "mxfp4")),
        ('"skip"', SKIP),
    ],
)
def test_specs_are_those_of_overrides(spec: str, expected: object) -> None:
    found = choose(f'[[rules]]\nrole = "head"\nspec = {spec}', AFFINE(32, 4))
    assert {path: choice.spec for path, choice in found.items()} == {"lm_head": expected}


# -- mlx-lm's mixed recipes ------------------------------------------------------------
def test_mixed_by_hand() -> None:
    """Twelve blocks: an eighth is 1, so 0, 11 and every third from 3 on are favoured; 10 is not."""
    found = load_recipe("mixed_3_6").choose(PATHS, AFFINE(32, 4))
    more = {path for path, choice in found.items() if choice.spec == AFFINE(32, 6)}
    assert {path for path, choice in found.items() if choice.spec == AFFINE(32, 3)} == (
        set(PATHS) - more
    )
    favoured = {0, 3, 6, 9, 10, 11}  # 7 * 12 // 8 is 10
    assert more == {"lm_head"} | {
        path
        for path in PATHS
        if path.startswith("model.layers")
        and int(path.split(".")[2]) in favoured
        and path.rsplit(".", 1)[-1] in ("v_proj", "down_proj")
    }


def test_mixed_needs_a_down_proj() -> None:
    with pytest.raises(UsageError, match="mixed_2_6 starts from layers named down_proj"):
        load_recipe("mixed_2_6").choose(["h.0.mlp.c_proj"], None)


# -- what comes with requant -----------------------------------------------------------
def test_every_shipped_recipe_is_sound_and_says_something() -> None:
    names = recipe_names()
    assert names[:4] == ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]
    assert names[4:7] == ["mixed_3_5", "mixed_3_8", "mixed_4_8"]
    assert names[7:] == ["down-6", "ends-8", "experts-3", "mxfp4-8"]
    for name in names:
        recipe = load_recipe(name)
        assert recipe.description and recipe.choose(PATHS, recipe.default)
        assert recipe_text(recipe).strip()


def test_the_docs_describe_every_recipe_and_role() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for word in (*recipe_names(), *ROLES):
        assert f"`{word}`" in page


# -- with other options -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "default"),
    [
        ({}, AFFINE(32, 3)),
        ({"bits": 5}, AFFINE(32, 5)),
        ({"group_size": 128}, AFFINE(128, 3)),
        ({"mode": "mxfp8"}, Quantization(32, 8, "mxfp8")),
        ({"quantization": AFFINE(64, 8)}, AFFINE(64, 8)),
    ],
)
def test_what_is_said_replaces_the_default(options: dict, default: Quantization, tmp_path: Path):
    (tmp_path / "mine.toml").write_text("[default]\nbits = 3\ngroup_size = 32\n")
    assert (
        ConvertOptions.from_arguments(recipe=tmp_path / "mine.toml", **options).quantization
        == default
    )


def test_options_that_a_recipe_contradicts(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[default]\nmode = "mxfp4"\n')
    with pytest.raises(UsageError, match="choose one"):
        ConvertOptions.from_arguments(recipe="ends-8", dequantize=True)
    with pytest.raises(UsageError, match="mixed_2_6 is for the affine mode, not mxfp4"):
        ConvertOptions.from_arguments(recipe="mixed_2_6", mode="mxfp4")
    with pytest.raises(OutOfRangeError, match="mxfp4 takes"):
        ConvertOptions.from_arguments(recipe=tmp_path / "mine.toml", bits=8)


# -- errors ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[default", "is not valid TOML: "),
        ("", "rules: there are none, and no [default]"),
        ("[defaults]\nbits = 4", "defaults: is not a known key; did you mean 'default'?"),
        (
            "colour = 1\n[default]",
            "colour: is not a known key; known: description, search, quality, default, rules",
        ),
        ("description = 4\n[default]", "description: is 4, expected a text"),
        ("default = 4", "default: is 4, expected a table"),
        ("[default]\nbit = 4", "default.bit: is not a known key; did you mean 'bits'?"),
        ("[default]\nbits = '4'", "default.bits: is '4', expected a number"),
        ("[default]\nbits = true", "default.bits: is true, expected a number"),
        ("[default]\nbits = 7", "default: bits = 7: affine takes"),
        ("[default]\nmode = 'fp4'", "default: no such quantization mode: 'fp4'; known:"),
        ("[rules]\nspec = 8", "rules: is an object, expected [[rules]] tables"),
        ("rules = [8]", "rules[1]: is 8, expected a table"),
        ("[[rules]]\nmatch = 'a'", "rules[1].spec: is missing; write bits (8)"),
        ("[[rules]]\nmatch = 'a'\nspec = 8.5", "rules[1].spec: is 8.5, expected bits"),
        ("[[rules]]\nmatch = 'a'\nspec = true", "rules[1].spec: is true, expected bits"),
        ("[[rules]]\nmatch = 'a'\nspec = 7", "rules[1].spec: '7' is not a quantization of MLX"),
        (
            "[[rules]]\nmatch = 'a'\nspec = 'skp'",
            "rules[1].spec: 'skp' is not a valid SPEC; write bits",
        ),
        (
            "[[rules]]\nmatch = '('\nspec = 8",
            "rules[1].match: '(' is not a valid regular expression",
        ),
        ("[[rules]]\nmatch = 4\nspec = 8", "rules[1].match: is 4, expected a regex"),
        (
            "[[rules]]\nrole = 'haed'\nspec = 8",
            "rules[1].role: 'haed' is not a role; close matches: head",
        ),
        ("[[rules]]\nrole = [4]\nspec = 8", "rules[1].role: is [4], expected a role"),
        ("[[rules]]\nfirst = -1\nspec = 8", "rules[1].first: is -1, expected 0 or more"),
        ("[[rules]]\nlast = '2'\nspec = 8", "rules[1].last: is '2', expected a number of blocks"),
        (
            "[[rules]]\nspec = 8",
            "rules[1]: has no condition; write match, role, first, last or layers",
        ),
        (
            "[[rules]]\nmatc = 'a'\nspec = 8",
            "rules[1].matc: is not a known key; did you mean 'match'",
        ),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_recipe(text, "mine.toml")
    assert str(raised.value).startswith("recipe mine.toml ")
    assert message in str(raised.value)


def test_every_problem_in_one_run() -> None:
    with pytest.raises(UsageError) as raised:
        parse_recipe("[default]\nbits = 7\n[[rules]]\nrole = 'x'\nspec = 9\n[[rules]]", "mine")
    lines = str(raised.value).splitlines()[1:]
    keys = ["default", "rules[1].spec", "rules[1].role", "rules[2].spec", "rules[2]"]
    assert [line.split(":")[0].strip() for line in lines] == keys


def test_names_and_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe 'mixed_36'; close matches: mixed_3_6; known: "):
        load_recipe("mixed_36")
    with pytest.raises(UsageError, match="No such file"):
        load_recipe(tmp_path / "nowhere.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not UTF-8"):
        load_recipe(tmp_path / "bytes.toml")


def test_a_recipe_turns_the_search_on(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('search = "fast"\n[default]\nbits = 3\n')
    assert ConvertOptions.from_arguments(recipe=file).search == "fast"
    assert ConvertOptions.from_arguments(recipe=file, search="best").search == "best"
    recipe = load_recipe(file)
    assert parse_recipe(to_toml(recipe), str(file)) == recipe
    assert ConvertOptions.from_dict(
        ConvertOptions.from_arguments(recipe=file).to_dict()
    ) == ConvertOptions.from_arguments(recipe=file)
    file.write_text('search = "slow"\n[default]\nbits = 3\n')
    with pytest.raises(UsageError, match="search: is 'slow', expected fast or best"):
        load_recipe(file)
