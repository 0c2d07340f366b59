"""The words of the tasks, by the part they play. Common English ones, and invented ones where a name must be new.

A tokenizer of any model can read them; the retrieval model of the examples has a token for each.
"""

from __future__ import annotations

import itertools
import random


def _split(text: str) -> list[str]:
    return text.split()


ADJECTIVES = _split(
    "amber ancient brave bright bronze calm clever copper coral crimson curious distant eager early faded fierce "
    "gentle golden hidden honest humble indigo ivory jade lively lonely loyal marble mellow misty noble pale patient "
    "proud quiet rapid rustic scarlet silent silver solemn spotted steady stormy striped sunny tidy velvet violet wild"
)

ANIMALS = _split(
    "badger beaver bison buffalo camel caribou cheetah cobra condor coyote crane cricket crow dolphin donkey eagle "
    "falcon ferret finch fox gazelle gecko goose hamster hare hawk hedgehog heron horse hyena ibex iguana jackal "
    "kestrel koala lemur leopard lizard lobster lynx magpie marten mole moose mule newt ocelot octopus osprey otter "
    "panda panther parrot pelican penguin pigeon puffin python quail rabbit raccoon raven robin salmon seal shark "
    "spider squirrel stork swan tiger toad turtle viper walrus weasel whale wolf wombat yak zebra"
)

# What needles hold.
VALUES = _split(
    "acorn anchor apple apron arrow bagel bakery balcony balloon bamboo banana banjo barrel basket beacon bell bench "
    "blanket bottle bridge broom bucket button cabin cactus candle canoe canvas carpet carrot castle cellar chain "
    "chapel cherry chimney circle clock cloud clover coffee comet compass cotton cradle crayon crystal cupboard "
    "curtain cushion dagger daisy desert diamond drawer drum engine fabric feather fence fiddle flag flute forest "
    "fountain garden garlic ginger glacier globe goblet guitar hammer harbor harvest helmet honey hotel iceberg island "
    "jacket jigsaw kettle kitchen kite ladder lagoon lantern lemon letter library lighthouse locket magnet mango "
    "mansion maple market meadow medal melon mirror mitten monument mountain muffin mushroom napkin necklace needle "
    "notebook nutmeg oasis ocean olive onion orchard organ oven paddle paint palace pancake papaya parcel parsley "
    "pebble pencil pepper piano picnic pillow pirate planet plum pocket potato pottery prairie pumpkin puzzle quilt "
    "radio raft raisin ribbon rocket saddle sailor salad sandal satchel saucer scarf school scissors shadow shovel "
    "slipper snowball sofa spoon stadium staircase statue stove suitcase sunset sweater table teapot temple thimble "
    "thunder ticket timber toast tomato tower tractor train treasure trumpet tunnel turnip umbrella valley village "
    "violin volcano wagon walnut waterfall whistle willow window wizard yogurt"
)

# Who, what, how and where of the prose around the needles.
PEOPLE = _split(
    "artist baker barber butcher captain carpenter child clerk cook dentist doctor driver farmer fisherman gardener "
    "grandmother guard guest hunter judge lawyer mason mayor merchant miner neighbor nurse painter pilot plumber poet "
    "porter postman priest sister soldier student tailor teacher uncle visitor waiter weaver writer"
)
VERBS = _split(
    "admired borrowed bought carried chose cleaned counted described drew dropped examined fetched finished forgot "
    "gave guarded held hid kept knew left lent liked lost made mended missed moved needed noticed ordered praised "
    "remembered repaired saw sent showed sold studied touched traded wanted washed watched"
)
THINGS = _split(
    "answers bags boats bones books boots boxes bricks cards chairs cheese clothes coins cups doors dreams eggs "
    "gloves grapes hats jewels keys knives lamps leaves maps nets newspapers paper pictures pipes plants plates poems "
    "reports ropes sacks shirts shoes songs stamps stones stories tickets tools toys trees wheels wood"
)
PLACES = _split(
    "beach border camp cave church city coast corner court creek dock factory farm field gate hall hill hospital house "
    "inn lake mill museum office park pier pond port prison road room roof shop square stable station street theater "
    "town wall well workshop yard"
)
TIMES = _split("autumn day evening friday midnight monday morning night noon spring summer sunday tuesday week winter")
PREPOSITIONS = _split("above across around behind beside below beyond by inside near outside past through toward under")

NUMBERS = [str(number) for number in range(100, 1000)]


def _invented(pattern: tuple[str, ...], count: int) -> list[str]:
    """`count` of the words that the pattern allows."""
    return random.Random(0).sample(["".join(letters) for letters in itertools.product(*pattern)], count)


# What is assigned in variable tracking, and what is counted in frequent words.
VARIABLES = _invented(("bdfgklmnprstvz", "aeiou", "dklmnrtvz", "aeiou", "kx"), 400)
CODED = _invented(("bdgjkptvz", "aeiou", "lmr", "bdgkptz", "aeiou", "qj"), 48)
