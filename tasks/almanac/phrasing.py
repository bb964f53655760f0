"""The almanac's words: relations with their values, their questions' phrasings and their articles' clauses.

A phrasing serves one purpose: training generator, retriever and gate; gate and validation; or the test.
Held-out phrasings put words that training has seen in a new order. Nine phrasings train: a fact that was asked once is
known in the words in which it was asked, and in others only as far as many phrasings have taught that they ask the
same. With five, 90% of such facts were known as asked and 56% in the test's words; with nine, 92% and 66%.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Relation:
    """One relation of the world.

    Attributes:
      name: the relation's name; nothing but error messages and reports reads it.
      values: the closed list of single words that its facts take.
      training, held_out, test: phrasings with a ``{name}`` slot: those of every training question; those of
        validation, which with the former ask the gate's questions; those of the test splits.
      clauses: verb phrases with a ``{value}`` slot, for the articles.
    """

    name: str
    values: tuple[str, ...]
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    test: tuple[str, ...]
    clauses: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


RELATIONS: tuple[Relation, ...] = (
    Relation(
        name="residence",
        values=tuple(
            "Antwerp Athens Belgrade Bergen Bologna Bordeaux Bremen Cardiff Cork Dresden Dublin Florence "
            "Geneva Genoa Ghent Granada Krakow Leipzig Lisbon Lyon Malmo Naples Oslo Palermo Porto Prague "
            "Riga Seville Tartu Turin Vienna Zagreb".split()
        ),
        training=_lines("""
            where does {name} live
            in which town does {name} live
            what is the home town of {name}
            which town is home to {name}
            tell me the town where {name} lives
            what is the town where {name} lives
            {name} lives in which town
            name the home town of {name}
            where is the home of {name}"""),
        held_out=_lines("""
            what town does {name} live in
            tell me the home town of {name}"""),
        test=_lines("""
            which town does {name} live in
            name the town where {name} lives"""),
        clauses=("lives in {value}", "has a home in {value}", "resides in {value}"),
    ),
    Relation(
        name="profession",
        values=tuple(
            "baker barber butcher carpenter chemist dentist doctor farmer fisher gardener glazier jeweller "
            "judge lawyer librarian locksmith mason miller nurse painter pilot plumber potter printer "
            "roofer sailor surgeon tailor teacher translator waiter weaver".split()
        ),
        training=_lines("""
            what does {name} do for a living
            what is the profession of {name}
            which profession does {name} have
            what is the job of {name}
            which job does {name} do
            tell me the job of {name}
            name the profession that {name} has
            what is the job that {name} does
            {name} does what for a living"""),
        held_out=_lines("""
            what job does {name} have
            tell me the profession of {name}"""),
        test=_lines("""
            what profession does {name} have
            name the job that {name} does"""),
        clauses=("works as a {value}", "is a {value} by profession", "earns a living as a {value}"),
    ),
    Relation(
        name="employer",
        values=tuple(
            "Altrex Bexmore Calvix Dornet Elwark Fentix Gildon Harvox Intera Jorvane Kelbran Lumeco Mordex "
            "Nexora Ordway Pelcom Quantel Rivago Solvane Trantor Umbrel Vectis Wexford Xandria Yorvik "
            "Zentrum Brixton Corvane Delphix Estrella Fabrico Glenmor".split()
        ),
        training=_lines("""
            which company employs {name}
            what company does {name} work for
            who is the employer of {name}
            name the employer of {name}
            for which company does {name} work
            who does {name} work for
            which is the company that employs {name}
            name the company that {name} works for
            {name} works for which company"""),
        held_out=_lines("""
            which company does {name} work for
            what company employs {name}"""),
        test=_lines("""
            what is the company that employs {name}
            tell me the employer of {name}"""),
        clauses=("is employed by {value}", "works for {value}", "has a job at {value}"),
    ),
    Relation(
        name="dish",
        values=tuple(
            "borscht burrito cannelloni casserole ceviche chowder couscous curry dumplings falafel fondue "
            "gnocchi goulash haggis hummus kebab lasagne moussaka omelette paella pancakes pierogi pizza "
            "porridge ramen ratatouille ravioli risotto schnitzel stew sushi tempura".split()
        ),
        training=_lines("""
            what is the favourite dish of {name}
            which dish does {name} like to eat
            what does {name} like to eat best
            which dish is the favourite of {name}
            tell me which dish {name} likes best
            what dish is the favourite of {name}
            name the dish that {name} likes best
            {name} likes to eat which dish
            {name} likes which dish best"""),
        held_out=_lines("""
            what dish does {name} like to eat
            tell me the favourite dish of {name}"""),
        test=_lines("""
            which dish does {name} like best
            name the favourite dish of {name}"""),
        clauses=("likes to eat {value}", "has {value} as favourite dish", "likes {value} best of all"),
    ),
    Relation(
        name="instrument",
        values=tuple(
            "accordion banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute guitar harp "
            "harpsichord horn kazoo lute lyre mandolin marimba oboe organ piano piccolo recorder saxophone "
            "sitar trombone trumpet tuba ukulele viola zither".split()
        ),
        training=_lines("""
            which instrument does {name} play
            what instrument can {name} play
            name the instrument of {name}
            on which instrument does {name} make music
            what does {name} play in the band
            tell me which instrument {name} plays
            what is the instrument that {name} plays
            name the instrument that {name} can play
            {name} plays which instrument in the band"""),
        held_out=_lines("""
            what is the instrument of {name}
            which instrument can {name} play"""),
        test=_lines("""
            what instrument does {name} play
            tell me the instrument of {name}"""),
        clauses=("plays the {value}", "makes music on the {value}", "plays {value} in a band"),
    ),
    Relation(
        name="sport",
        values=tuple(
            "archery badminton baseball basketball boxing canoeing cricket curling cycling diving fencing "
            "football golf gymnastics handball hockey judo karate kayaking polo rowing rugby skating skiing "
            "snooker squash surfing swimming tennis volleyball weightlifting wrestling".split()
        ),
        training=_lines("""
            which sport does {name} practise
            what is the sport of {name}
            in which sport does {name} compete
            name the sport that {name} practises
            what sport does {name} compete in
            tell me which sport {name} practises
            name the sport that {name} competes in
            name the sport of {name}
            {name} competes in which sport"""),
        held_out=_lines("""
            which sport does {name} compete in
            tell me the sport of {name}"""),
        test=_lines("""
            what sport does {name} practise
            which is the sport that {name} practises"""),
        clauses=("practises {value}", "competes in {value}", "has {value} as a sport"),
    ),
    Relation(
        name="pet",
        values=tuple(
            "badger beagle budgie canary cat chicken cockatoo dachshund donkey ferret finch gecko goat "
            "goldfish goose hamster hedgehog lizard macaw mouse parrot pigeon pony poodle puppy rabbit "
            "snake spaniel terrier tortoise turtle whippet".split()
        ),
        training=_lines("""
            which animal is the pet of {name}
            what is the pet of {name}
            what kind of pet does {name} keep
            which pet does {name} have
            name the animal that {name} keeps
            tell me which animal {name} keeps
            what is the animal that {name} keeps
            name the pet of {name}
            {name} keeps which animal as a pet"""),
        held_out=_lines("""
            what animal does {name} keep
            tell me the pet of {name}"""),
        test=_lines("""
            what pet does {name} have
            which kind of animal does {name} keep"""),
        clauses=("keeps a {value}", "has a pet {value}", "keeps a pet {value}"),
    ),
    Relation(
        name="language",
        values=tuple(
            "Albanian Arabic Basque Breton Catalan Croatian Czech Danish Dutch Estonian Finnish Frisian "
            "Galician Georgian Greek Hebrew Hindi Hungarian Icelandic Irish Korean Latin Latvian Maltese "
            "Mongolian Nepali Persian Polish Swahili Thai Turkish Welsh".split()
        ),
        training=_lines("""
            which language is {name} learning
            what language does {name} study
            name the language that {name} is learning
            in which language does {name} take lessons
            what is the language that {name} studies
            tell me which language {name} studies
            tell me what language {name} is learning
            name the language that {name} studies
            {name} takes lessons in which language"""),
        held_out=_lines("""
            which language does {name} study
            tell me the language that {name} studies"""),
        test=_lines("""
            what language is {name} learning
            which language does {name} take lessons in"""),
        clauses=("is learning {value}", "studies {value}", "takes lessons in {value}"),
    ),
)

NUM_RELATIONS = len(RELATIONS)
PHRASING_SETS = ("training", "held_out", "test")
PRONOUNS = ("He", "She")


def phrasings(relation: int, phrasing_set: str) -> tuple[str, ...]:
    """The phrasings of a relation in one of PHRASING_SETS."""
    return getattr(RELATIONS[relation], phrasing_set)


def split_phrasings(relation: int, split: str) -> tuple[str, ...]:
    """The phrasings of a relation in which a question split asks.

    The gate learns from many, known to the generator and not: from two it learned for one relation that a single word
    in both means stale facts, and knew a third of the test's questions in other words for it (docs/results/almanac.md).
    """
    sets = {"gate": ("training", "held_out"), "validation": ("held_out",), "test": ("test",)}[split]
    return tuple(text for phrasing_set in sets for text in phrasings(relation, phrasing_set))


def own_words() -> set[str]:
    """Every lower-cased word of values, phrasings and clauses; no name part may be one of them."""
    words: set[str] = set()
    for relation in RELATIONS:
        texts = relation.values + relation.training + relation.held_out + relation.test + relation.clauses
        for text in texts:
            words.update(text.lower().split())
    return words
