"""The miniature's domain: 84 things that three designers drew, and how they are split.

`label` is the name in `emojibase-data`; `name` is what our prompts say; a concept is on one
side of the split for good, so that students are trained, tuned and tested on disjoint things.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("glossy", "soft", "flat")
"""Fluent 3D (Microsoft), Noto (Google), Twemoji (Twitter), in the words of our prompts."""

_TRAIN = """fox; panda; frog; koala; pig face:pig; rabbit face:rabbit; lion; bear; mouse face:mouse;
penguin; turtle; octopus; tropical fish; lady beetle:ladybug; butterfly; spouting whale:whale;
cactus; sunflower; mushroom; maple leaf; evergreen tree:pine tree; watermelon; lemon; banana;
red apple:apple; pear; cherries; grapes; tomato; avocado; carrot; hamburger; pizza; doughnut;
soft ice cream:ice cream; lollipop; cheese wedge:cheese; soccer ball; basketball; balloon;
wrapped gift:gift; jack-o-lantern:pumpkin; red heart:heart; cloud; fire:flame; rocket; house;
light bulb:lamp; crown; alien"""

_VALIDATION = """cow face:cow; baby chick:chick; four leaf clover:clover; peach; eggplant; cupcake;
baseball; crescent moon:moon; bell; ghost"""

_TEST = """tiger face:tiger; dog face:dog; cat face:cat; monkey face:monkey; owl; crab; dolphin;
snail; tulip; palm tree; strawberry; pineapple; ear of corn:corn; broccoli; tangerine:orange;
cookie; french fries:fries; hot beverage:coffee; pool 8 ball:billiard ball; snowman without snow:snowman;
star; droplet:drop; sailboat:boat; umbrella"""


@dataclass(frozen=True)
class Concept:
    """One thing: its emojibase label, the name used in prompts and its split."""

    label: str
    name: str
    split: str


def _parse(text: str, split: str) -> list[Concept]:
    pairs = [entry.strip().split(":") for entry in text.replace("\n", " ").split(";")]
    return [Concept(pair[0], pair[-1], split) for pair in pairs]


CONCEPTS = tuple(_parse(_TRAIN, "train") + _parse(_VALIDATION, "validation") + _parse(_TEST, "test"))


def is_held_out(concept_index: int, style_index: int) -> bool:
    """A tenth of the (style, concept) pairs, whose drawing the teacher never sees."""
    return (concept_index * 3 + style_index * 7) % 10 == 4
