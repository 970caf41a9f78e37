"""Tools for training: skills with names, parameters and descriptions drawn at random."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from tiny.tasks import Tool
from tiny.tool_values import word
from tiny.tool_wordings import EXTRAS, GENERAL, GENERAL_SHARE, SKILLS, Skill


class Made(NamedTuple):
    """A tool, its skill, and its words."""

    tool: Tool
    skill_name: str
    words: dict[str, str]
    parameters: dict[str, str]  # the names of the parameters, by the slots of the skill

    @property
    def skill(self) -> Skill:
        return SKILLS[self.skill_name]

    @property
    def name(self) -> str:
        return str(self.tool["function"]["name"])

    def type_of(self, slot: str) -> str:
        properties = self.tool["function"]["parameters"]["properties"]
        return str(properties[self.parameters[slot]]["type"])


def _make_tool(rng: random.Random, skill_name: str, words: dict[str, str]) -> Made:
    skill = SKILLS[skill_name]
    made_up = skill_name != GENERAL and rng.random() < 0.1
    name = word(rng) if made_up else rng.choice(skill.names).format(**words)
    parameters: dict[str, str] = {}
    properties: dict[str, Any] = {}
    described = rng.random() < 0.3
    slots = list(skill.slots.items())
    if rng.random() < 0.25:
        rng.shuffle(slots)
    for slot_name, slot in slots:
        free = [one for one in slot.names if one.format(**words) not in properties]
        # a made-up name has no meaning: beside other parameters it needs a description
        unnamed = rng.random() < 0.1 and (described or len(slots) == 1)
        parameter = word(rng) if unnamed else rng.choice(free).format(**words)
        parameters[slot_name] = parameter
        properties[parameter] = {"type": _type(rng, slot.values)}
        if described:
            properties[parameter]["description"] = rng.choice(slot.descriptions).format(**words)
    extra = rng.choice(tuple(EXTRAS)) if rng.random() < 0.12 else None
    required = list(properties)
    if extra is not None and extra not in properties:
        properties[extra] = EXTRAS[extra]
    schema = {"type": "object", "properties": properties, "required": required}
    function: Tool = {"name": name, "parameters": schema}
    # without the skill's name only the description identifies it
    if made_up or rng.random() < 0.9:
        description = rng.choice(skill.descriptions).format(**words)
        function["description"] = description.rstrip(".") if rng.random() < 0.3 else description
    return Made({"type": "function", "function": function}, skill_name, words, parameters)


def _type(rng: random.Random, values: str) -> str:
    if values == "any":
        return rng.choice(("string", "string", "string", "integer"))
    if values != "number":
        return "string"
    return rng.choice(("integer", "integer", "number", "string"))


def make_tools(rng: random.Random, num: int) -> list[Made]:
    """Different tools. Words of made-up ones begin differently."""
    tools: list[Made] = []
    used: set[str] = set()
    while len(tools) < num:
        words = {}
        if rng.random() < GENERAL_SHARE:
            skill_name, noun, other = GENERAL, word(rng), word(rng)
            if noun[:2] == other[:2] or any(one[:2] in used for one in (noun, other)):
                continue
            used |= {noun[:2], other[:2]}
            words = {"noun": noun, "other": other, "Noun": noun.capitalize()}
        else:
            skill_name = rng.choice(_FIXED)
            if skill_name in used:
                continue
            used.add(skill_name)
        made = _make_tool(rng, skill_name, words)
        if made.name not in used:
            used.add(made.name)
            tools.append(made)
    return tools


_FIXED = tuple(name for name in SKILLS if name != GENERAL)
