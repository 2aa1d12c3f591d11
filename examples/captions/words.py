"""The plain words of the training sentences: a few hundred common English ones, and made-up ones in no list.

A caption model has to copy words that it never met, so every third plain word is put together from syllables here.
"""

from __future__ import annotations

from random import Random

NOUNS = """
meeting report answer question project budget train station ticket office letter number class lecture student teacher
market price garden kitchen window door table chair bottle paper river mountain bridge street city village country
world weather rain storm summer winter morning evening night week month year day hour minute moment story book film
music song picture camera phone screen computer system network server file folder password account order parcel
delivery customer manager driver doctor nurse patient hospital school library museum church factory engine machine
battery light power water coffee tea bread butter cheese apple orange dinner lunch breakfast family mother father
brother sister child friend neighbour team player game match goal ball race winner record law judge court police
government minister party vote election tax bank money job worker union company product service quality problem
solution reason result change choice chance plan idea thought mind heart hand head face eye voice word sentence
language sound noise silence space planet star moon earth sea ocean island beach boat ship plane airport wheel road
car bus bicycle engineer scientist experiment theory example method model data value test paragraph author editor
newspaper article headline speech debate agreement contract building floor roof wall corner room hall stage audience
ticket tourist passenger luggage suitcase passport border soldier war peace history future past present century decade
animal dog cat horse bird fish tree flower grass leaf seed farm farmer field forest stone metal gold silver glass wood
cotton leather jacket shirt shoe pocket button needle thread blanket pillow mirror clock candle envelope stamp
calendar schedule deadline agenda committee chairman member department director assistant secretary budget expense
receipt invoice payment discount refund warranty repair equipment instrument temperature pressure distance measurement
weight height length area volume surface pattern colour shape size style
""".split()

VERBS = """
is was has had will can could should would must goes went comes came takes took gives gave makes made says said tells
told asks asked needs wants likes knows knew thinks thought sees saw finds found keeps kept holds held leaves left
brings brought begins began shows showed hears heard plays played runs ran moves moved lives lived believes happened
writes wrote sits sat stands stood loses lost pays paid meets met includes continues sets learns changes leads
understands watches follows stops creates speaks spoke reads spends grows opens walks wins teaches offers remembers
loves considers appears buys bought serves dies sends sent expects builds built stays falls fell cuts reaches kills
remains suggests raises passes sells sold requires reports decides pulls returns explains hopes develops carries
breaks receives agrees supports hits produces eats covers catches draws chooses visits delivers arrived departs boards
closed closes starts started ends ended costs lasts weighs measures drops rises rose increased doubled cancelled
postponed announced published signed arrange check confirm send please wait turn press call
""".split()

OTHERS = """
and or but because so if when while although though unless until after before since about above across against along
among around at behind below beneath beside between beyond by down during except for from in inside into near of off
on onto out outside over through throughout to toward under up upon with within without the a an this that these those
my your his her its our their some any no every each all both few many much more most other another such what which
who whose whom where why how not never always often sometimes usually rarely soon later now then here there today
tomorrow yesterday tonight again already also almost enough even ever just only perhaps quite rather really still too
very well yet early late far fast hard high low long short next last first second third new old good bad better best
worse worst great small large big little young important different same free able local national public private
political social economic international special certain clear close cold hot warm dark deep easy difficult empty full
final general happy heavy human ready real red green blue black white grey yellow rich poor quick quiet loud safe
serious simple single strong sure true false whole wide wrong right left recent possible available likely common
current medical military modern natural normal original particular past physical popular previous primary proper
similar successful sudden technical tiny traditional usual various visible willing wonderful careful beautiful broken
busy cheap clean curious delicious dirty famous foreign friendly gentle healthy honest huge lazy lucky narrow nervous
patient perfect pleasant polite proud rough sharp silent slow smooth soft sour steep sweet tall thick thin tired ugly
useful useless weak wet wild wise we you they he she it him them us me i who i'm i'll i've you're we're they're it's
that's don't doesn't didn't can't won't isn't wasn't there's let's what's people everyone someone nobody nothing
something anything everything okay yes hello thanks sorry welcome unfortunately finally probably approximately exactly
nearly roughly directly carefully currently immediately generally hundred thousand million half quarter may march
point per hour minus
""".split()

PLAIN = tuple(dict.fromkeys(NOUNS + VERBS + OTHERS))

_ONSETS = """
b bl br c ch cl cr d dr f fl fr g gl gr h j k kn l m n p ph pl pr qu r s sc sh sk sl sm sn sp st str sw t th tr tw v w
wh wr y z
""".split() + [""] * 6
_VOWELS = "a e i o u a e i o u ai ea ee ie oa oo ou au ay ey io".split()
_CODAS = "b ck d ff ft g k l ld ll lt m mp n nd ng nk nt p r rd rk rm rn rt s sh sk ss st t th tch x z".split()
_CODAS += [""] * 16
_ENDINGS = "s ed ing er ers ly y ment tion ness able ful ity al ic ous ist ian 's ive ship ward est".split()
_ENDINGS += [""] * 30


def made_up(rng: Random) -> str:
    """A word of one to three syllables, 2 to 15 letters, that looks like English and usually is not."""
    while True:
        syllables = rng.choices((1, 2, 3), (3, 5, 2))[0]
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)]
        word = "".join(parts) + rng.choice(_ENDINGS)
        if 2 <= len(word) <= 15:
            return word


def plain(rng: Random) -> str:
    """Any plain word, every third one made up."""
    return made_up(rng) if rng.random() < 0.33 else rng.choice(PLAIN)


def noun(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.33 else rng.choice(NOUNS)


def verb(rng: Random) -> str:
    return made_up(rng) if rng.random() < 0.2 else rng.choice(VERBS)
