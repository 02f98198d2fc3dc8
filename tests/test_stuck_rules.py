# SPDX-License-Identifier: Apache-2.0
"""Rules without a way on, in grammars as xgrammar prints them and by what it then allows."""

import pytest
import xgrammar

from vllm_d2f.stuck_rules import stuck_rules

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
    grammar = xgrammar.Grammar.from_ebnf(ebnf)
    assert sorted(stuck_rules(str(grammar))) == sorted(GRAMMARS[ebnf])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(schema):
    assert bool(stuck_rules(str(xgrammar.Grammar.from_json_schema(schema)))) is SCHEMAS[schema]


@pytest.mark.parametrize("ebnf", [g for g in GRAMMARS if "root" not in GRAMMARS[g]])
def test_the_library_agrees_about_the_first_character(ebnf):
    """Where `root` has a way on, a matcher over single bytes allows one, or is complete."""
    tokens = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)], stop_token_ids=[])
    compiled = xgrammar.GrammarCompiler(tokens, max_threads=1).compile_grammar(ebnf)
    matcher = xgrammar.GrammarMatcher(compiled, terminate_without_stop_token=True)
    allowed = xgrammar.allocate_token_bitmask(1, 256)
    matcher.fill_next_token_bitmask(allowed, 0)
    assert allowed.any() or matcher.is_completed()


def test_what_is_not_understood_is_not_refused():
    assert stuck_rules("root ::= TagDispatch((a, b))\nb ::= ((root))") == []
    assert stuck_rules("root ::= ((<unknown>))") == []
    assert stuck_rules("") == []
