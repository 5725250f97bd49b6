"""Write the data set `orders`: messages to a village shop, each with the order in it as one line of JSON.

    python examples/make_orders.py        # rewrites the files in examples/orders, byte for byte the same

train.jsonl and test.jsonl have a message and its order; pairs.jsonl has preference pairs: a message, its order, and a
wrong one. Everything is sampled from the lists below with a fixed seed. The test part has its own sentence frames,
remarks, names, surnames and goods, and four counts of its own: none of these occurs in the training part, or in a
message of the pairs, which is made as those of the training part are. What all share is what has to be learned: the
days, the ways of writing a number, and what in a message is not part of the order.
"""

import json
import random
import re
from pathlib import Path

SEED = 2024
SIZES = {"train": 1600, "test": 200, "pairs": 800}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS += [f"{stem}teen" for stem in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
NUMBERS += ["twenty", "twenty-one", "twenty-two", "twenty-three", "twenty-four"]
TEST_COUNTS = {7, 14, 19, 22}  # they occur in the test part only, among the others

# Sentence frames: {o} is the goods and how many, {p} the person, {w} the day with its "on" or "this" (at times an hour,
# which is not asked for), {d} the bare day. A field that a frame leaves out, or that is sampled as missing, is null.
FRAMES = {
    "train": """
Hi, {p} here. Could I have {o} {w}? | Please put {o} aside for {p}, pick-up {w}. | {p} would like {o} {w}, please.
{w} I will come by for {o}. {p} | order for {p}: {o}, {w} | {o} please, {w}, thanks, {p}
Hello! I need {o} {w}. My name is {p}. | Can you get {o} ready {w}? It's for {p}.
This is {p}. I'd like to order {o}, collecting {w}. | {p} wants {o} {w}.
Is it possible to have {o} {w}? Regards, {p} | We'd love {o} {w}. Ask for {p}. | {p} - {o} {w} | {o} for {p} {w}
{p}, {w}, {o} | {w}: {o} ({p}) | Good morning, I'm {p} and I need {o} {w}.
Would you keep {o} for me {w}? Cheers, {p} | Name: {p}. Order: {o}. When: {d}. | {w}, please: {o}. Put it under {p}.
Hey, it's {p} again, {o} {w} this time. | I'm after {o}. {d} would suit. {p} | My cousin {p} will fetch {o} {w}.
My partner {p} comes {w} to collect {o}. | Please reserve {o} in the name of {p}. {w}.
On behalf of {p} I'm ordering {o} {w}. | {p} asked me to book {o} {w}. | Evening all, put {p} down for {o} {w}!
Just {o} from me. {w}. {p} | {o}, {w}. Signed {p} | Reserve under {p}: {o}. {d} is fine.
{w} we need {o}. I, {p}, will be there. | {p} is coming {w} and takes {o}. | How about {d}? {o} for {p}.
{w} {p} will call for {o}. | I can make it {w}. {o}, and my name's {p}. | {d}: {p} collects {o}.
{d}? I want {o}. Thanks a lot, {p} | {p} speaking, it's about {d}. I need {o}. | Have {o} waiting {w}. {p}
Do you have {o}? {p} could come {w}. | If you have {o}, {p} will take them {w}.
Send word to {p} when {o} can go out {w}. | Dear shop, kindly prepare {o} {w}. Yours, {p} | Quick one: {o}, {w}, {p}.
We ran out, so {o} {w} please. {p} | It's for a party: {o} {w}. {p} is paying. | Pls hold {o} 4 {p} {w} thx
need {o} {w} - {p} | hiya {p} here, {o} pls, {w} | The school needs {o} {w}, contact is {p}.
Could {p} pick up {o} {w}? | May I ask for {o} {w}? You know me, {p}. | Same as ever for {p}, {o} {w}.
Our order: {o}. We come {w}. The name is {p}. | For {d}: {o}. Will be round, {p}. | Can I get {o} {w}?
I'd like {o} {w}, thank you. | {o} {w} please | We need {o}. Pick-up {w}. | Please have {o} ready {w}.
{w} I'd want {o}, if you can. | Any chance of {o} {w}? | {d} works. {o}, and I'd be there.
Is there {o} left? Could come {w}. | Hello, {o} {w}, cheers! | We are out of stock. {o} {w}, please.
I was told you have {o}. {d} is good for me. | Could you reserve {o} {w}? Many greetings. | just {o} {w} thx
""",
    "test": """
Hello there, {p} on the line, I was hoping for {o} {w}. | You can expect {p} {w} for {o}.
Let {p} have {o} {w}, would you? | Kindly set {o} aside. {p} drops in {w}.
Shopping list of {p}: {o}, to be fetched {w} | {w} {p} is going to need {o}. | Me again ({p})! {o} {w}, as agreed.
Best make that {o}, {w}. Love, {p} | Customer {p}, goods {o}, ready {w}
Sorry to bother you, but might there be {o} for us {w}? Best wishes, {p}
The club is short of {o}, so {p} will stop by {w}. | My flatmate {p} picks up {o} {w}.
To whom it may concern: I require {o} {w}. Sincerely, {p} | Jot down {o} for {p}, would you, {w}.
{o} is what I want, {w} if you please. {p} | {p} is keen on {o} {w}, ok? | Write me down, {p}: {o}. I'm free {d}.
I shall call {w} to get {o}; {p} is the name. | What about {d}? We'd fetch {o}. Kind regards from {p}
By {d} I must have {o}. Yours truly, {p} | {p} rang and wants {o} {w}. | {d} would be best for {p}. That's {o}.
Save us {o}, we pass by {w}. | Looking for {o} {w}, many thanks! | It would be lovely to have {o} {w}.
Bag up {o}, I'm there {w}. | {o}? {d}, if that's alright.
""",
}
# Remarks that are not the order, though they may hold a name {x}, a day {e}, a number {k} or an hour {h}.
REMARKS = {
    "train": """
I rang at {h} but nobody answered. | {x} sends greetings. | We live at number {k}. | Say hello to {x}. | {x} is well.
You were closed last {e}. | My car is still broken. | I paid {k} euros last time. | {x} told me about your shop.
No rush at all. | The last lot was lovely. | It is for my sister {x}'s birthday. | Your sign says you open at {h}.
Ring me if anything changes. | Is {x} still working with you? | We have been here for {k} years! | Is it raining?
Sorry I missed you on {e}. | The parking was awful on {e}. | I have {k} guests to feed. | Don't tell {x}, it's a secret.
Cash or card? | Hope the weather holds. | The bus gets in at {h}. | Last time {x} gave me the wrong bag.
I met {x} in town. | {x} and I loved the concert on {e}. | Our street fair on {e} was great. | How is {x} doing?
Thank {x} for the advice. | Did you get my letter of {e}? | I'll bring my own bag. | {x} says your prices are fair.
It's {k} miles from here. | Wasn't {e} a hot day? | I heard that {x} is ill. | I will be at work until {h}. | Bless {x}!
""",
    "test": """
Has {x} recovered from the flu? | My office shuts at {h}. | I still owe you {k} pounds. | We moved to flat {k}.
Great chat with {x} the other day. | The market on {e} was a delight. | I hope the queue is short. | Keep the change.
{x} recommended you warmly. | I tried phoning around {h}. | What a rainy week. | We're a family of {k}.
""",
}
# First names; to those of the training part come invented ones, a start and an end of STEMS, so that few come often and
# the spelling has to be copied. Surnames are sampled in the same way.
NAMES = {
    "train": """Anna Ben Carla Dmitri Elif Farid Greta Hugo Ines Jakub Keiko Liam Mona Nils Oksana Paulo Rania Sven Tara
Umar Vera Wanda Yusuf Zoë Aïcha Björn Chloé Dörte Émile François Jürgen José Łucja Márta Noémi Örjan Renée Søren Tomáš
Fiona Gavin Joyce Kamal Petra Quinn Samir Theo Viktor Wendy Xenia Yara Zaid Bruno Esther Felix Gloria Karim Miguel Omar
Priya Ravi Sofia Tariq Ursula Vijay Willem Ximena Yvonne Åsa Çağla Şirin Ilse Kofi Amara Chidi Folake Mei Hiro Linh""",
    "test": """Adele Bastien Celine Duncan Eszter Fatima Gustav Heidi Ismail Jana Kenji Lucía Mehmet Naomi Orla Pavel
Rashid Selma Tobias Uche Valentina Wojciech Yasmin Zuzana Agnès Bjarne Édith Gülay Håkan Iñigo Jiří Kateřina Małgorzata
Nuño Päivi Ruža Stéphane Thérèse Václav Zoltán Abebe Conor Dalia Ewan Freya Gwen Hamza Isla Joost Latif Marit""",
}
SURNAMES = {
    "train": """Adeyemi Becker Castillo Dubois Eriksen Gupta Ibrahim Kowalski Lambert Novak Osei Quispe Rossi Suzuki
Thompson Vargas Walker Yilmaz Zhang Müller Šimek Núñez Bąk Grönlund Farkas""",
    "test": """Abbott Bianchi Chaudhry Delgado Engel Fontaine Greco Horvat Iyer Kaplan Lindqvist Mbeki Nakamura O'Brien
Popescu Rahman Sørensen Tanaka Weiß Żuraw Peña""",
}
STEMS = (
    """Al Am Bel Ber Cas Cor Dan Dor El Em Fer Flo Gal Gwyn Hal Hes Is Iv Jas Jor Kal Kes Lor Lys Mar Mir Nad Nev Ol Or
Per Pav Ran Ros Sal Ster Tam Thev Ul Vas Ver Wil Wen Yol Yev Zan Zel Bér Jó Łuc Żan Sör Chry Drag Pim Kazh Snež""",
    "a ana am eth el ia ian ika ina ild is itza ko ler o ob olt on ora os otta rik sen ulo ulla ven win yn ánt ěj ić",
)
# One department a line: what the goods may be called before the bar, the goods (their singular) after it.
GOODS = {
    "train": """rye seeded sourdough plain wholemeal|roll bagel bun baguette crumpet
clay hanging square glazed mossy|pot planter saucer trough
steel brass wood short rusty|screw nail bolt hinge hook bracket washer
lined blue thick ruled spiral|notebook folder envelope binder pad
red climbing white dwarf potted|rose tulip dahlia fern tomato plant lily
paper canvas striped jumbo mini|bag sack box basket
wax scented tall church floating|candle lantern torch lamp
cotton woollen linen checked fluffy|towel blanket apron cushion napkin rug
apple cherry plum onion cheese|pie tart muffin pasty quiche
oak folding garden camping low|chair bench table stool
soft wire wide scrubbing horsehair|brush broom mop duster
tin enamel copper ceramic big|mug kettle bowl jug teapot dish
speckled free-range duck goose large|egg
used spare front racing bicycle|tyre pedal saddle chain bell
smoked spicy pork vegan long|sausage burger kebab
""",
    "test": """bamboo velvet leather quilted amber|handbag belt purse necklace brooch
marbled gilded acrylic sable fine|easel crayon stencil frame
pumpkin walnut raisin almond ginger|scone biscuit waffle pretzel pancake
nylon rubber plastic marine waxed|rope bucket hose float glove
solar cordless digital vintage pocket|torchlight battery charger clock camera
maple pine willow mulberry juniper|sapling shrub seedling hedge bush
silk tartan corduroy felted knitted|ribbon button zipper patch hat
herbal peppermint jasmine chilled fizzy|teabag lemonade cordial smoothie
""",
}


def sample_line(rng: random.Random, lines: str) -> str:
    """One entry of lines whose entries are separated by " | "."""
    return rng.choice([entry.strip() for line in lines.strip().split("\n") for entry in line.split(" | ")])


def invent_name(rng: random.Random) -> str:
    """A name of two syllable groups that is not one of the test part."""
    while True:
        name = "".join(rng.choice(half.split()) for half in STEMS)
        if name not in (NAMES["test"] + SURNAMES["test"]).split():
            return name


def sample_name(rng: random.Random, part: str) -> str:
    """A first name, at times with a surname."""
    first, last = rng.choice(NAMES[part].split()), rng.choice(SURNAMES[part].split())
    if part == "train":
        first, last = (invent_name(rng) if rng.random() < 0.7 else name for name in (first, last))
    return f"{first} {last}" if rng.random() < 0.25 else first


def sample_day(rng: random.Random) -> tuple[str, str]:
    """A day as it is written and as it is normalised."""
    day = rng.choice(DAYS)
    return rng.choice([day, day, day[:3], day.lower(), day[:4] if day[0] == "T" else day]), day


def sample_hour(rng: random.Random) -> str:
    """An hour as it is written: it is never part of the answer."""
    hour, half = rng.randint(1, 12), rng.choice(["", "", ":30"])
    spoken = [f"{NUMBERS[hour]} o'clock", f"half past {NUMBERS[hour]}"]
    return rng.choice([f"{hour}{half or ':00'}", f"{hour}{half}pm", *spoken])


def sample_goods(rng: random.Random, part: str) -> tuple[str, str]:
    """What is ordered, as it is written and as it is normalised."""
    kinds, goods = rng.choice(GOODS[part].strip().split("\n")).split("|")
    item = rng.choice(goods.split())
    if rng.random() < 0.8:
        item = f"{rng.choice(kinds.split())} {item}"
    ending = "es" if item.endswith(("sh", "ch", "x", "o")) else "s"
    plural = item[:-1] + "ies" if item.endswith("y") else item + ending
    while True:
        count = rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, rng.randint(1, 24), rng.randint(1, 24)])
        if part == "test" and rng.random() < 0.15:
            count = rng.choice(sorted(TEST_COUNTS))
        if part == "test" or count not in TEST_COUNTS:
            break
    if count == 1:
        article = "an" if item[0] in "aeiou" else "a"
        return rng.choice([f"{article} {item}", f"{article} {item}", f"one {item}", f"1 {item}"]), f"1 x {item}"
    special = {2: "a couple of", 6: "half a dozen", 12: "a dozen", 24: "two dozen"}
    ways = [f"{count} {plural}", f"{NUMBERS[count]} {plural}", f"{count}x {plural}", f"{plural} ({count})"]
    ways += [f"{special[count]} {plural}"] * 2 if count in special else [ways[0], ways[1]]
    return rng.choice(ways), f"{count} x {plural}"


def misspell(rng: random.Random, frame: str) -> str:
    """Swap two letters in the middle of one of the frame's longer words."""
    words = frame.split(" ")
    long = [i for i, word in enumerate(words) if word.isalpha() and len(word) > 4]
    if long:
        i = rng.choice(long)
        at = rng.randint(1, len(words[i]) - 3)
        words[i] = words[i][:at] + words[i][at + 1] + words[i][at] + words[i][at + 2 :]
    return " ".join(words)


def sample_row(rng: random.Random, part: str) -> dict[str, str]:
    """A message and the order in it."""
    frame, person = sample_line(rng, FRAMES[part]), sample_name(rng, part)
    said_day, day = sample_day(rng)
    said_goods, goods = sample_goods(rng, part)
    has_day = "{d}" in frame or rng.random() < 0.75
    when = rng.choice(["on ", "on ", "this "]) + said_day if has_day else ""
    if has_day and rng.random() < 0.15:
        when += f" {rng.choice(['at', 'around', 'after'])} {sample_hour(rng)}"
    if rng.random() < 0.05:
        frame = misspell(rng, frame)
    if lower := rng.random() < 0.12:
        frame, when, said_day = frame.lower(), when.lower(), said_day.lower()
    text = frame.format(p=person, o=said_goods, w=when, d=said_day)
    if rng.random() < 0.2:
        other = sample_name(rng, part).split()[0]
        remark = sample_line(rng, REMARKS[part])
        remark = remark.format(x=other, e=rng.choice(DAYS), k=rng.randint(3, 60), h=sample_hour(rng))
        text = f"{remark} {text}" if rng.random() < 0.4 else text + (" " if text[-1] in ".!?" else ". ") + remark
    text = re.sub(r" +", " ", text)  # what a missing {w} leaves behind
    text = re.sub(r"[ ,.:]*([,.:?!])(?= |$)", r"\1", text).strip(" ,:-")
    text = text if lower else text[0].upper() + text[1:]
    order = {"name": person if "{p}" in frame else None, "order": goods, "day": day if has_day else None}
    return {"prompt": text, "completion": to_json(order)}


def sample_pair(rng: random.Random) -> dict[str, str]:
    """A message of the training part, the order in it, and a wrong one: with a mistake as a model makes it."""
    row = sample_row(rng, "train")
    order = json.loads(row["completion"])
    count, _, goods = order["order"].partition(" x ")
    first = (order["name"] or sample_name(rng, "train")).split()[0]
    mistakes = {  # for each part of an order what it may be taken for
        "name": [None, first, sample_name(rng, "train")],
        "order": [f"{max(1, int(count) + rng.choice([-1, 1, 10]))} x {goods}", goods, f"{count} x {goods.split()[-1]}"],
        "day": [None, rng.choice(DAYS)],
    }
    key, wrong = rng.choice([(key, wrong) for key in mistakes for wrong in mistakes[key] if wrong != order[key]])
    rejected = to_json(order | {key: wrong})
    if rng.random() < 0.2:  # the right order, but not alone
        rejected = rng.choice(["Here is the order: {}", "{}\nIs there anything else?"]).format(row["completion"])
    return {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}


def to_json(order: dict[str, str | None]) -> str:
    """An order as it is written in an answer."""
    return json.dumps(order, ensure_ascii=False, separators=(",", ":"))


def main() -> None:
    """Write all parts; no message occurs twice in them."""
    folder = Path(__file__).parent / "orders"
    folder.mkdir(exist_ok=True)
    seen: set[str] = set()
    for part, size in SIZES.items():
        rng, rows = random.Random(f"{SEED} {part}"), []
        while len(rows) < size:
            row = sample_pair(rng) if part == "pairs" else sample_row(rng, part)
            if row["prompt"].lower() not in seen:
                seen.add(row["prompt"].lower())
                rows.append(row)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        print(f"{folder / part}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
