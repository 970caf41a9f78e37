"""The tools of the embedded models' training: their names, parameters, questions and values.

Slots of phrasings are in braces and have the names of the parameters' values.
"""

from __future__ import annotations

from dataclasses import dataclass

from tiny.wordings import CAPITALS, LETTER_WORDS, NAMES, THINGS

GENERAL = "general"  # a skill of made-up tools, which a question names by a word


@dataclass(frozen=True)
class Slot:
    """A parameter. names: one of them is its name. values: a key of `tool_values.VALUES`."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    values: str


@dataclass(frozen=True)
class Skill:
    """What a tool does. slots: by the names that phrasings have for their values.

    keys: of the results, if they are JSON objects. several: a question may ask for two values, each
    of which needs a call.
    """

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    slots: dict[str, Slot]
    phrasings: tuple[str, ...]
    keys: tuple[str, ...]
    several: bool = True


_CITY = Slot(
    ("city", "location", "place", "town", "city_name"),
    ("The city", "The name of the city", "City and country", "The city, e.g. Paris", "A place"),
    "city",
)
_COUNTRY = Slot(("country", "nation", "country_name"), ("The country", "Name of it"), "country")
_PERSON = Slot(
    ("to", "name", "recipient", "person", "contact"),
    ("The recipient", "Name of the person", "Who gets it"),
    "name",
)
_NUMBER = Slot(("number", "x", "value", "n"), ("The number", "A number"), "number")
_WORD = Slot(("word", "text", "term"), ("The word", "A word"), "word")

SKILLS = {
    "weather": Skill(
        ("get_weather", "weather", "current_weather", "get_current_weather", "weather_in",
         "weatherLookup", "forecast"),
        ("Get the weather in a city.", "The current weather", "Get current weather for a location",
         "Weather of a place", "Get the weather forecast for a given city."),
        {"a": _CITY},
        ("What is the weather in {a}?", "What's the weather in {a}?", "How is the weather in {a}?",
         "What is the weather like in {a}?", "What's the weather like in {a} today?",
         "Weather in {a}?", "Tell me the weather in {a}.", "Get the weather in {a}.",
         "Is it raining in {a}?", "How warm is it in {a}?", "Show me the weather for {a}.",
         "What is the weather in {a} now?"),
        ("temperature", "sky", "wind", "weather"),
    ),
    "time": Skill(
        ("get_time", "time_in", "current_time", "local_time", "clock", "get_current_time"),
        ("Get the time in a city.", "The local time of a place", "Get the current time somewhere"),
        {"a": _CITY},
        ("What time is it in {a}?", "What is the time in {a}?", "Tell me the time in {a}.",
         "How late is it in {a}?", "Which time is it in {a}?", "Time in {a}?"),
        ("time", "hour", "zone"),
    ),
    "population": Skill(
        ("get_population", "population", "population_of", "count_people"),
        ("Get the population of a country.", "How many people live in a country"),
        {"a": _COUNTRY},
        ("What is the population of {a}?", "How many people live in {a}?",
         "Tell me the population of {a}.", "How big is the population of {a}?"),
        ("population", "people", "year"),
    ),
    "message": Skill(
        ("send_message", "message", "send_text", "send_sms", "notify", "send_email"),
        ("Send a message to a person.", "Sends text to somebody", "Write a message"),
        {"a": _PERSON,
         "b": Slot(("text", "message", "body", "content"), ("The text", "What to send"), "text")},
        ("Send {a} the message {b}.", "Send a message to {a}: {b}", "Tell {a}: {b}",
         'Send "{b}" to {a}.', "Write to {a}: {b}", "Message {a}: {b}"),
        ("status", "id"),
        several=False,
    ),
    "call": Skill(
        ("call", "phone", "make_call", "call_person", "dial"),
        ("Call a person.", "Make a phone call", "Phones a contact"),
        {"a": _PERSON},
        ("Call {a}.", "Phone {a}.", "Make a call to {a}.", "Can you call {a}?",
         "I want to call {a}."),
        ("status", "minutes"),
    ),
    "translate": Skill(
        ("translate", "translate_word", "translation", "translator"),
        ("Translate a word into a language.", "Translates text"),
        {"a": _WORD,
         "b": Slot(("language", "to", "target", "target_language"), ("The language", "Target"),
                   "language")},
        ("Translate {a} into {b}.", "Translate {a} to {b}.", "What is {a} in {b}?",
         'How do you say "{a}" in {b}?', "Translate the word {a} into {b}."),
        ("translation", "text", "word"),
        several=False,
    ),
    "price": Skill(
        ("get_price", "price", "price_of", "price_lookup", "product_price"),
        ("Get the price of a thing.", "What a product costs", "Look up the price of an item"),
        {"a": Slot(("item", "product", "thing", "article"), ("The product", "A thing"), "thing")},
        ("What is the price of {a}?", "How much is {a}?", "How much does {a} cost?",
         "What does {a} cost?", "Tell me the price of {a}.", "Price of {a}?"),
        ("price", "cost", "stock"),
    ),
    "dice": Skill(
        ("roll_die", "roll_dice", "roll", "dice", "throw_die"),
        ("Roll a die with some sides.", "Rolls dice", "Throw a die"),
        {"a": Slot(("sides", "num_sides", "faces", "n"), ("The sides", "Number of sides"),
                   "number")},
        ("Roll a die with {a} sides.", "Roll a {a}-sided die.", "Throw a die with {a} sides.",
         "Roll a d{a}.", "Can you roll a die with {a} sides?"),
        ("roll", "value"),
    ),
    "root": Skill(
        ("square_root", "sqrt", "root", "get_root"),
        ("The square root of a number.", "Get a square root", "Computes the root of x"),
        {"a": _NUMBER},
        ("What is the square root of {a}?", "Square root of {a}?",
         "Compute the square root of {a}.", "Calculate the square root of {a}.",
         "Take the square root of {a}.", "What is sqrt({a})?"),
        ("root", "value", "result"),
    ),
    "alarm": Skill(
        ("set_alarm", "alarm", "add_alarm", "wake_up", "create_alarm"),
        ("Set an alarm.", "Wakes you at a time", "Set the alarm clock"),
        {"a": Slot(("time", "at", "when", "alarm_time"), ("The time", "hh:mm"), "time")},
        ("Set an alarm for {a}.", "Set an alarm at {a}.", "Wake me at {a}.", "Wake me up at {a}.",
         "I need an alarm at {a}.", "Alarm at {a}, please."),
        ("status", "alarm"),
    ),
    "timer": Skill(
        ("set_timer", "start_timer", "timer", "countdown"),
        ("Start a timer.", "Set a timer of some minutes", "Counts minutes down"),
        {"a": Slot(("minutes", "duration", "length", "mins"), ("The minutes", "How long"),
                   "number")},
        ("Set a timer for {a} minutes.", "Start a timer of {a} minutes.", "Timer for {a} minutes.",
         "Set a {a} minute timer."),
        ("status", "ends"),
    ),
    "convert": Skill(
        ("convert", "convert_currency", "exchange", "currency_converter"),
        ("Convert money.", "Convert an amount to a currency", "Exchange of currencies"),
        {"a": Slot(("amount", "value", "sum"), ("The amount", "How much"), "number"),
         "b": Slot(("from", "source", "from_currency"), ("From", "Source currency"), "currency"),
         "c": Slot(("to", "target", "to_currency"), ("To", "Target currency"), "currency")},
        ("Convert {a} {b} to {c}.", "Convert {a} {b} into {c}.", "How much is {a} {b} in {c}?",
         "What is {a} {b} in {c}?", "Change {a} {b} to {c}."),
        ("amount", "result", "rate"),
        several=False,
    ),
    "search": Skill(
        ("search", "web_search", "search_web", "find", "lookup"),
        ("Search the web.", "Search for words", "Find pages on the internet"),
        {"a": Slot(("query", "q", "words", "search_query"), ("The words", "What to search"),
                   "text")},
        ("Search for {a}.", "Search the web for {a}.", "Look up {a}.", "Google {a}.",
         "Find pages about {a}.", "Search {a}"),
        ("title", "page", "results"),
        several=False,
    ),
    "calendar": Skill(
        ("add_event", "create_event", "calendar", "new_event", "schedule_meeting"),
        ("Add a meeting to the calendar.", "Create an event", "Plan a meeting with somebody"),
        {"a": Slot(("person", "with", "name", "guest"), ("The person", "The guest"), "name"),
         "b": Slot(("time", "at", "start"), ("The time", "When it starts"), "time")},
        ("Plan a meeting with {a} at {b}.", "Meet {a} at {b}.", "Add a meeting with {a} at {b}.",
         "I meet {a} at {b}, put it in the calendar.", "Schedule a meeting at {b} with {a}."),
        ("status", "event", "id"),
        several=False,
    ),
    "light": Skill(
        ("turn_on", "switch_on", "light_on", "set_light", "lights"),
        ("Turn on the light in a room.", "Switches a light on"),
        {"a": Slot(("room", "place", "where"), ("The room", "Which room"), "room")},
        ("Turn on the light in the {a}.", "Switch on the {a} light.", "Turn the {a} light on.",
         "Light in the {a}, please."),
        ("status", "room"),
    ),
    "music": Skill(
        ("play_music", "play", "play_song", "music", "start_music"),
        ("Play a song.", "Plays music", "Play music by title"),
        {"a": Slot(("song", "title", "track", "name"), ("The song", "The title"), "title")},
        ("Play {a}.", "Play the song {a}.", "Can you play {a}?", "I want to hear {a}.",
         "Put on {a}."),
        ("status", "song", "seconds"),
        several=False,
    ),
    # {noun} and {other} are words, the same in the tool and in the question
    GENERAL: Skill(
        ("get_{noun}", "{noun}_of", "find_{noun}", "{noun}", "{noun}_lookup", "read_{noun}",
         "{other}_{noun}", "get_{other}_{noun}", "get{Noun}", "compute_{noun}"),
        ("Get the {noun} of a {other}.", "The {noun} of a {other}", "Look up the {noun}.",
         "Find the {noun} for a {other}", "Returns the {noun} of the {other}."),
        {"a": Slot(("{other}", "{other}_name", "name", "id", "of", "item", "x"),
                   ("The {other}", "Name of the {other}"), "any")},
        ("What is the {noun} of {a}?", "What's the {noun} of {a}?", "Get the {noun} of {a}.",
         "Tell me the {noun} of {a}.", "Find the {noun} of {a}.", "Look up the {noun} of {a}.",
         "Which {noun} does {a} have?", "What {noun} has {a}?", "What is the {noun} for {a}?",
         "Show me the {noun} of the {other} {a}.", "What is the {noun} of the {other} {a}?"),
        ("{noun}", "value", "result"),
    ),
}  # fmt: skip
GENERAL_SHARE = 0.3  # of the tools

_MORE_CITIES = """
New York, San Francisco, Los Angeles, Hong Kong, Rio de Janeiro, Cape Town, São Paulo, Zürich,
München, Köln, Boston, Chicago, Seattle, Sydney, Melbourne, Barcelona, Milan, Hamburg, Munich, Lyon,
Mumbai, Shanghai, Shenzhen, Istanbul, Kraków, Málaga, Geneva, Porto, Toronto, Montréal, Houston,
Dallas, Osaka, Kyoto, Antwerp, Naples, Venice, Manchester, Glasgow, Las Vegas, Salt Lake City
"""
_MORE_PEOPLE = """
Alice Bob Carol David Emma Frank Grace Henry Ivan Julia Karl Laura Maria Nils Olga Paul Rosa Sara
Theo Uma Vera Wei Xenia Zoe José Zoë Mary John Mum Dad
"""
CITIES = (*CAPITALS.values(), *(one.strip() for one in _MORE_CITIES.split(",")))
COUNTRIES = tuple(CAPITALS)
PEOPLE = (*NAMES, *_MORE_PEOPLE.split())
LANGUAGES = (
    *("French", "German", "Spanish", "Italian", "Dutch", "Polish", "Greek", "Turkish", "Korean"),
    *("Japanese", "Chinese", "Russian", "Arabic", "Hindi", "Swedish", "Latin", "Portuguese"),
)
CURRENCIES = (
    *("EUR", "USD", "GBP", "JPY", "CHF", "CNY", "SEK", "INR", "euros", "dollars", "pounds", "yen"),
    *("francs", "rupees"),
)
ROOMS = ("kitchen", "garden", "bedroom", "bathroom", "hall", "office", "garage", "cellar", "attic")
TEXTS = (
    *("I am late", "see you at {n}", "happy birthday", "dinner is ready", "call me back"),
    *("the {w} is here", "please buy {w}", "where is the {w}", "good morning", "I am at the {w}"),
    *("bring the {w} and the {w2}", "no {w} today", "{w} {w2}", "{w}", "the {w} {w2} {n}"),
    *("how to {w} a {w2}", "best {w} in {city}", "the {w} of {w2}", "{n} {w}", "thank you"),
)
GOODS = tuple(sorted({*THINGS, *LETTER_WORDS[::3]}))

# Parameters that no question is about: name -> schema
EXTRAS = {
    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    "units": {"type": "string", "enum": ["metric", "imperial"]},
    "format": {"type": "string"},
    "limit": {"type": "integer"},
    "lang": {"type": "string", "description": "Language of the answer"},
    "verbose": {"type": "boolean"},
    "detail": {"type": "string", "enum": ["low", "high"]},
}

SKIES = ("sunny", "cloudy", "rain", "snow", "fog", "windy", "clear", "storm")
STATUS = ("ok", "done", "sent", "set", "ready", "saved", "failed", "busy", "not found")
SENTENCES = (
    "It is {sky} in {city}.", "The {w} is {n}.", "Done.", "OK.", "Sent to {name}.",
    "No {w} found.", "There are {n} {w}.", "{name} has {n} {w}.", "It is {n} degrees and {sky}.",
    "The {w} is not known.", "Set for {t}.",
)  # fmt: skip
TEXT_RESULTS = (
    "{n}", "{n}", "{n}.{d}", "{w}", "{sky}", "{sky}, {n} degrees", "{n} degrees", "{t}", "{name}",
    "{city}", "{n} {w}", "{w} {w2}", "-{n}", "{status}", "{n} km", "{n} euros", "{n}%", "{X}",
)  # fmt: skip
ERRORS = ("unknown {w}", "not found", "no {w}", "timeout", "{w} is missing", "invalid {w}")
