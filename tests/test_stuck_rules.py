# SPDX-License-Identifier: Apache-2.0
"""Rules of a grammar that match no text and allow no next character, found with the matcher."""

import pytest
import xgrammar
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_d2f.admission import check_grammar, stuck_rules

GRAMMARS = {
    "root ::= root": ["root"],
    'root ::= "7" more\nmore ::= more': ["more"],
    'root ::= "a" | "7" more\nmore ::= again\nagain ::= more "x"': ["more", "again"],
    # Endless, but it goes on.
    'root ::= "7" more\nmore ::= "x" more': [],
    'root ::= a\na ::= b "x"\nb ::= "y" a | a': [],
    'root ::= ""': [],
    'root ::= more? "x"\nmore ::= more': ["more"],
    'root ::= more{0,3} "x"\nmore ::= "m"': [],
    # Names and marks inside of strings and classes are text.
    'root ::= "more | (" [|"(\\]] more{2,3}\nmore ::= "\\"" root | "more"': [],
    'root ::= [0-9]{1,3} ("," [0-9]+)* more?\nmore ::= "b" | root': [],
}
SCHEMAS = {
    '{"$ref": "#"}': True,
    '{"anyOf": [{"$ref": "#"}, {"type": "integer"}]}': False,
    '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}': False,
    '{"type": "array", "items": {"$ref": "#"}}': False,
    '{"type": "string", "pattern": "a|b\\\\\\\\|(c)"}': False,
}


@pytest.mark.parametrize("ebnf", GRAMMARS)
def test_grammars(ebnf):
    assert stuck_rules(xgrammar.Grammar.from_ebnf(ebnf)) == GRAMMARS[ebnf]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(schema):
    assert bool(stuck_rules(xgrammar.Grammar.from_json_schema(schema))) is SCHEMAS[schema]


@pytest.mark.parametrize("ebnf", [g for g in GRAMMARS if "root" not in GRAMMARS[g]])
def test_the_library_agrees_about_the_first_character(ebnf):
    """Where `root` has a way on, a matcher over single bytes allows one, or is complete."""
    tokens = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], stop_token_ids=[])
    compiled = xgrammar.GrammarCompiler(tokens, max_threads=1).compile_grammar(ebnf)
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    allowed = xgrammar.allocate_token_bitmask(1, 256)
    matcher.fill_next_token_bitmask(allowed, 0)
    assert allowed.any() or matcher.is_completed()


def test_what_xgrammar_does_not_read_again_is_not_refused():
    dispatch = xgrammar.Grammar.from_ebnf(
        'root ::= TagDispatch(("a", b))\nb ::= "x" | more\nmore ::= more'
    )
    assert stuck_rules(dispatch) == ["more"]

    class Unreadable:
        def __str__(self) -> str:
            return "root ::= ((<unknown>))"

    assert stuck_rules(Unreadable()) == []


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (
            dict(grammar='root ::= "7" more\nmore ::= more'),
            "no text matches `more`.*every rule",
        ),
        (
            dict(json='{"$ref": "#"}'),
            r"json: no text matches a part.*every `\$ref` to itself",
        ),
        (dict(json={"$ref": "#"}), "json: no text matches"),
        (dict(grammar='root ::= "7" more\nmore ::= "x" more'), None),
        (dict(json={"type": "array", "items": {"$ref": "#"}}), None),
        (dict(regex="[0-9]+"), None),
    ],
)
def test_admission(structured, message):
    """A refusal says what to change; every other grammar passes."""
    params = StructuredOutputsParams(**structured)
    params._backend = "xgrammar"
    if message is None:
        check_grammar(params)
        return
    with pytest.raises(VLLMValidationError, match=message):
        check_grammar(params)


@pytest.mark.parametrize(("rules", "found"), [(1500, ["r700"]), (2500, [])])
def test_many_rules(rules, found):
    """The search holds up a server, so that it is left out where it would take seconds."""
    bodies = {f"r{i}": "r700" if i == 700 else f'"{i}"' for i in range(rules)}
    lines = [f"root ::= {' | '.join(bodies)}", *(f"{k} ::= {v}" for k, v in bodies.items())]
    assert stuck_rules(xgrammar.Grammar.from_ebnf("\n".join(lines))) == found
