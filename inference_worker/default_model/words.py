"""Word lists from which the corpus composes sentences to repeat and questions to decline."""

from typing import Final


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


NAMES: Final = _words(
    """Ada Alan Alice Amir Anna Ben Bob Carla Carlos Chen Clara Daniel David Diana Elena Emil Emma
    Eric Eva Felix Finn Frank Grace Hannah Hans Hugo Ines Ivan Jack James Jane Jonas Julia Kai Karl
    Kate Kenji Lara Lea Leo Lily Lin Linus Lisa Luca Lucy Maria Mark Marta Max Mia Mila Mohammed
    Nina Noah Olga Oscar Otto Paul Peter Petra Priya Rosa Ruth Sam Sara Simon Sofia Tara Tim Tom
    Uma Vera Victor Wei Yuki Zoe"""
)
PLACES: Final = _words(
    """Berlin Munich Hamburg Paris London Rome Madrid Vienna Oslo Tokyo Boston Chicago Lisbon
    Prague Warsaw Athens Cairo Sydney Toronto Dublin Zurich Milan Delhi Lima"""
)
OTHER_COUNTRIES: Final = _words(
    """Brazil Mexico Peru Chile Egypt Kenya Turkey Finland Denmark Hungary Ireland Iceland Cuba
    Vietnam Thailand Korea Nepal Bolivia Morocco Ghana Romania Croatia Serbia Atlantis
    Wonderland Australia Argentina India Russia Switzerland"""
)
ADJECTIVES: Final = _words(
    """quick brown lazy small big red green blue yellow black white old new young happy sad warm
    cold hot soft hard loud quiet bright dark clean dirty strong weak tall short long round flat
    fast slow sweet sour fresh dry wet rich poor kind brave clever silly funny tired hungry busy
    free empty full open closed heavy light deep high low strange simple tiny huge gentle golden
    silver wooden early late good bad nice great little wild calm sharp smooth"""
)
NOUNS: Final = _words(
    """fox dog cat horse cow bird fish mouse bear lion tiger wolf rabbit duck frog bee house door
    window garden tree flower river sea lake mountain road bridge city village street car train
    bus boat ship plane bicycle book letter word story song picture table chair bed lamp clock
    cup bottle plate spoon knife bread cheese apple banana orange lemon egg milk water tea coffee
    soup cake sugar salt pepper rain snow wind storm cloud sun moon star sky night morning evening
    day week year summer winter child friend teacher doctor farmer baker king queen sailor
    student neighbor sister brother mother father man woman people team computer phone robot
    machine server client network model token stream message test box key bag coat hat shoe ball
    game wall floor roof kitchen school shop market office paper pencil stone sand fire gold
    iron glass piano guitar drum planet engine camera mirror ladder hammer"""
)
VERBS: Final = _words(
    """jumps runs walks sits stands sleeps sings dances swims flies waits looks works plays stops
    starts falls grows smiles laughs cries talks lives stays rests"""
)
ACTIONS: Final = _words(
    """sees likes loves eats finds takes makes brings buys sells opens closes reads writes watches
    follows helps calls carries cleans paints builds breaks fixes draws keeps wants needs knows
    sends reaches moves"""
)
BASE_ACTIONS: Final = _words(
    """see like eat find take make bring buy sell open close read write watch follow help call
    carry clean paint build break fix draw keep want need know send reach move cook learn solve
    grow teach feed repair wash choose"""
)
PREPOSITIONS: Final = _words(
    "over under near behind with without into from through around beside above below"
)
ADVERBS: Final = _words(
    """today now again always never often slowly quickly quietly here there together tomorrow
    yesterday outside inside well very soon later"""
)
COMMON: Final = _words(
    """a able about after all also am an and another any are as ask at away back be because been
    before being best better between both but by came can cannot come could did different do does
    done down each easy else end enough even ever everyone everything far feel few finally first
    five for four from front gave get give go goes going gone got had half hand has have he head
    hear her him his home hour how human hundred I idea if important in interesting into is it its
    just kept kind knew large last learn left less let life line little long lot made make many may
    me mean meeting might million mine minute moment money month more most much must my name near
    next noon nothing number of off oh on once one only or other our out own part past pay perhaps
    place please plenty point precious problem quite rather reach ready really reason right room
    said same saw say second see seem seen seven she should show side since six sleep so some
    someone something sometimes soon sorry speak step still such sure talk than thank that the
    their them then these they thing think third this those thousand three through time times to
    too took true try turn twelve twenty two under until up upon us use used usually very want was
    way we went were what when where which while who whole whose why will with without wonderful
    word work world would yes yet you your Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    January March April June July August October December England Europe America English French
    pizza pasta homework dinner breakfast lunch library expensive sofa chocolate elephant monkey
    penguin dragon dinosaur banana sandwich potato tomato hospital airport museum beach forest
    island holiday birthday weekend family cousin uncle aunt language question answer memory
    software keyboard internet email website button screen error buffer queue thread process"""
)
PRONOUNS: Final = ("I", "You", "We", "They")
CLAUSES: Final = _lines(
    """
    the quick brown fox jumps over the lazy dog
    this is a test
    this is not a test
    this is only a test
    all good things come to an end
    practice makes perfect
    time flies like an arrow
    the early bird catches the worm
    better late than never
    a picture is worth a thousand words
    actions speak louder than words
    where there is a will there is a way
    I like to eat apples and bananas
    we will meet again tomorrow
    it is a nice day today
    the weather is very good this morning
    my favorite color is green
    there is no place like home
    you can do it if you try
    she sells sea shells by the sea shore
    the train to Berlin is late again
    I do not know what to say
    let me think about it
    that was a very good idea
    please keep off the grass
    everything will be fine
    tokens are streamed one by one
    the server is ready
    nothing to see here
    what goes up must come down
    knowledge is power
    I have been here before
    they were not at home last night
    he said that he would come back
    how much wood would a woodchuck chuck
    could you tell me where the station is
    the cat sat on the mat
    two plus two is four
    hello world
    hello
    hi
    yes
    cheese
    good morning
    I love you
    happy birthday to you
    good morning everyone
    see you later my friend
    I am happy to be here
    one small step for a man
    to be or not to be
    we have all the time in the world
    which way did they go
    some of them have never been seen
    our house is bigger than yours
    do not worry about the rain
    their children went to school by bus
    because of the storm the shop was closed
    """
)
SUBJECTS: Final = _lines(
    """
    photosynthesis
    gravity
    quantum physics
    the meaning of life
    the speed of light
    the tallest mountain
    the largest ocean
    the theory of relativity
    blockchain
    Kubernetes
    Docker
    Rust
    Java
    Linux
    a black hole
    democracy
    inflation
    the stock market
    the Roman Empire
    football
    chess
    jazz
    opera
    philosophy
    evolution
    electricity
    a virus
    an atom
    history
    geography
    algebra
    a prime number
    a database
    a compiler
    cryptography
    the Internet
    a volcano
    climate change
    meditation
    love
    happiness
    music
    art
    cooking
    yoga
    a llama
    a pancake
    a pizza
    sushi
    the best car
    the population of India
    the square root of 16
    a hash table
    bubble sort
    the weather on Mars
    a transformer
    batch size
    backpropagation
    reinforcement learning
    statistics
    probability
    """
)
NUMBER_WORDS: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty",
)  # fmt: skip
SYLLABLE_STARTS: Final = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z",
    "bl", "br", "ch", "cl", "cr", "dr", "fl", "fr", "gl", "gr", "pl", "pr", "qu", "sh", "sk",
    "sl", "sp", "st", "th", "tr", "wh", "",
)  # fmt: skip
SYLLABLE_MIDDLES: Final = (
    "a", "e", "i", "o", "u", "y", "ai", "ea", "ee", "ie", "oo", "ou", "au", "oa",
)  # fmt: skip
SYLLABLE_ENDS: Final = (
    "", "", "", "b", "ck", "d", "f", "g", "l", "ll", "m", "n", "nd", "ng", "nt", "p", "r", "rd",
    "s", "ss", "st", "t", "th", "x", "tion", "ly", "er", "ing", "ed", "es",
)  # fmt: skip
RARE_SIGNS: Final = (
    "äöüßéèñçøåłžπΩжшяअकあいうかな漢字水火山川日月人大中小上下한글عربש€£→≠√😀🎉🌍🚀👍🏽❤️🦊🐢☕⚡"
)
