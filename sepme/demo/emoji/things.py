"""What the emoji world shows: 299 things and nine studios; where a studio's slug differs from the common one."""

from __future__ import annotations

from typing import NamedTuple


class Studio(NamedTuple):
    """One emoji set.

    Attributes:
        package: ``@iconify-json/<package>``.
        version: the one that was trained on.
        word: its name in captions.
    """

    package: str
    version: str
    word: str
    author: str
    licence: str


STUDIOS = (
    Studio("noto", "1.2.9", "noto", "Google", "Apache-2.0"),
    Studio("noto-v1", "1.2.5", "blob", "Google (the blobs of 2013-2017)", "Apache-2.0"),
    Studio("twemoji", "1.2.5", "twemoji", "Twitter", "CC-BY-4.0"),
    Studio("openmoji", "1.2.29", "openmoji", "OpenMoji, HfG Schwaebisch Gmuend", "CC-BY-SA-4.0"),
    Studio("fluent-emoji-flat", "1.2.6", "fluent", "Microsoft, flat", "MIT"),
    Studio("fluent-emoji", "1.2.7", "glossy", "Microsoft, three-dimensional look", "MIT"),
    Studio("fxemoji", "1.2.2", "firefox", "Mozilla", "Apache-2.0"),
    Studio("emojione", "1.2.3", "emojione", "Emoji One, second edition", "CC-BY-4.0"),
    Studio("emojione-v1", "1.2.3", "cartoon", "Emoji One, first edition", "CC-BY-SA-4.0"),
)
STYLES = tuple(s.word for s in STUDIOS)

# the first hundred are what training starts with: one object each, told apart at a glance
THINGS = tuple(
    """
    church fuel-pump rocket cat dog horse elephant penguin red-apple banana strawberry pineapple watermelon cherries grapes
    lemon mushroom cactus rose sunflower tulip palm-tree snowflake rainbow fire cloud umbrella-with-rain-drops crescent-moon
    star red-heart airplane helicopter sailboat ship bicycle automobile ambulance police-car fire-engine tractor motorcycle
    rooster fish tropical-fish octopus turtle snake snail honeybee lady-beetle spider whale dolphin crocodile pig cow-face
    frog koala monkey-face bear ghost alien skull crown ring gem-stone guitar violin trumpet saxophone camera television
    telescope microscope light-bulb candle alarm-clock key hammer wrench scissors anchor balloon wrapped-gift birthday-cake
    hamburger pizza french-fries doughnut ice-cream lollipop cookie bread wine-glass beer-mug hot-beverage soccer-ball
    trophy house factory volcano tent

    baseball american-football bomb bell battery bathtub book-stack briefcase handbag clipboard calendar memo pencil
    paperclip pushpin newspaper envelope package postbox printer desktop-computer radio microphone
    headphone megaphone loudspeaker video-game game-die bowling billiards dress kimono bikini jeans top-hat
    graduation-cap sunglasses glasses lipstick high-heeled-shoe watch eye ear nose mouth tongue footprints paw-prints
    man woman boy girl baby princess ogre bus taxi train tram metro monorail minibus trolleybus delivery-truck
    speedboat school hospital hotel bank station stadium fountain circus-tent ferris-wheel roller-coaster desert
    desert-island camping mount-fuji sunrise cityscape foggy tornado cyclone droplet sparkles collision dizzy fireworks
    christmas-tree jack-o-lantern party-popper crystal-ball bouquet blossom hibiscus cherry-blossom herb seedling
    four-leaf-clover maple-leaf deciduous-tree evergreen-tree peach pear melon tangerine tomato green-apple eggplant
    hot-pepper ear-of-corn rice-ball sushi spaghetti oden dango custard shortcake candy chocolate-bar honey-pot cooking
    poultry-leg meat-on-bone cocktail-glass tropical-drink baby-bottle bird chicken baby-chick blowfish bug ant mouse rat
    ox water-buffalo tiger ram goat boar poodle monkey chipmunk hamster panda wolf horse-face spiral-shell spider-web
    thermometer syringe pill toilet shower door seat wastebasket trackball pager ticket rosette sports-medal military-medal
    money-bag credit-card magnifying-glass mobile-phone telephone film-projector movie-camera artist-palette
    musical-keyboard open-book notebook electric-plug satellite-antenna nut-and-bolt barber-pole statue-of-liberty world-map
    snowman t-shirt castle basketball tennis dragon-face racing-car locomotive gift-heart sun thumbs-up victory-hand
    raised-fist grinning-face crying-face
    """.split()
)  # fmt: skip

# common slug: a set's own slug, where dropping its hyphens or following its aliases does not find it
OWN_SLUGS: dict[str, dict[str, str]] = {
    "*": {
        "book-stack": "books",
        "billiards": "pool-8-ball",
        "magnifying-glass": "magnifying-glass-tilted-left",
        "gift-heart": "heart-with-ribbon",
        "snowman": "snowman-without-snow",
    },
    "fxemoji": {
        "book-stack": "books", "billiards": "billiards", "magnifying-glass": "leftmagnifyingglass", "gift-heart": "heartribbon",
        "gem-stone": "gem", "scissors": "blackscissors", "wrapped-gift": "present", "pizza": "sliceofpizza", "house": "housebuilding",
        "high-heeled-shoe": "heels", "evergreen-tree": "evergreen", "eggplant": "aubergine",
        "hot-pepper": "chilipepper", "ear-of-corn": "earofmaize", "hamster": "hampster", "panda": "pandaface", "wolf": "wolfface",
        "mobile-phone": "cellphone", "telephone": "blacktelephone", "t-shirt": "mansshirt", "castle": "europeancastle",
        "basketball": "basketballandhoop", "tennis": "tennisball", "dragon-face": "dragonhead", "racing-car": "racecar",
        "locomotive": "steamlocomotive", "sun": "sunrays", "grinning-face": "grin", "crying-face": "crying",
    },
}  # fmt: skip


# what people call a thing where its slug is not it; the slug's words become a synonym
NAMES = {
    "cow-face": "cow", "horse-face": "horse head", "umbrella-with-rain-drops": "umbrella", "hot-beverage": "coffee", "automobile": "car",
    "wrapped-gift": "gift", "lady-beetle": "ladybug", "headphone": "headphones", "gift-heart": "heart with ribbon", "game-die": "dice",
    "desktop-computer": "computer", "book-stack": "books", "video-game": "game controller", "jack-o-lantern": "pumpkin lantern",
    "honeybee": "bee", "gem-stone": "diamond", "doughnut": "donut", "ear-of-corn": "corn", "postbox": "mailbox",
}  # fmt: skip


def name_of(slug: str) -> str:
    """What captions call a thing: "red apple"."""
    return NAMES.get(slug) or slug.replace("-", " ")
