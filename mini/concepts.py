"""The miniature's domain: 166 things that three designers drew, and how they are split.

`label` is the name in `emojibase-data`; `name` is what our prompts say; a concept is on one
side of the split for good, so that students are trained, tuned and tested on disjoint things.
"""

from __future__ import annotations

from dataclasses import dataclass

STYLES = ("glossy", "soft", "flat")
"""Fluent 3D (Microsoft), Noto (Google), Twemoji (Twitter), in the words of our prompts."""

_TRAIN = """fox; panda; frog; koala; pig face:pig; rabbit face:rabbit; lion; bear; mouse face:mouse; wolf; elephant;
penguin; flamingo; turtle; octopus; jellyfish; tropical fish; spouting whale:whale; lady beetle:ladybug; honeybee:bee;
butterfly; cactus; sunflower; rose; mushroom; maple leaf; evergreen tree:pine tree; watermelon; lemon; banana;
red apple:apple; pear; cherries; grapes; blueberries; kiwi fruit:kiwi; tomato; avocado; carrot; hot pepper:chili; onion;
hamburger; pizza; hot dog; egg; pretzel; waffle; popcorn; doughnut; soft ice cream:ice cream; lollipop; candy;
cheese wedge:cheese; teapot; beer mug:beer; soccer ball; basketball; american football:football; trophy; game die:die;
yarn; balloon; wrapped gift:gift; jack-o-lantern:pumpkin; red heart:heart; sun; cloud; snowflake; fire:flame; volcano;
rocket; bus; automobile:car; anchor; house; light bulb:lamp; hourglass done:hourglass; watch; camera; envelope; key;
drum; sunglasses; dress; crown; alien"""

_VALIDATION = """cow face:cow; unicorn; baby chick:chick; four leaf clover:clover; peach; eggplant; croissant; cupcake;
baseball; crescent moon:moon; ringed planet:planet; tent; bell; candle; gem stone:diamond; ghost"""

_TEST = """tiger face:tiger; dog face:dog; cat face:cat; monkey face:monkey; raccoon; hedgehog; owl; parrot; duck; crab;
shark; dolphin; snail; spider; tulip; cherry blossom; palm tree; strawberry; pineapple; coconut; tangerine:orange;
ear of corn:corn; broccoli; cucumber; garlic; bread; taco; french fries:fries; cooking:fried egg; cookie;
birthday cake:cake; honey pot:honey; hot beverage:coffee; wine glass:wine; bubble tea; pool 8 ball:billiard ball;
bullseye:target; puzzle piece; teddy bear; video game:controller; artist palette:palette; guitar;
snowman without snow:snowman; star; rainbow; high voltage:lightning; droplet:drop; water wave:wave; sailboat:boat;
locomotive:train; tractor; airplane:plane; ring buoy:life ring; castle; umbrella; t-shirt:shirt; socks; top hat;
alarm clock; television; package:box; locked:padlock; magnet; robot"""


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
