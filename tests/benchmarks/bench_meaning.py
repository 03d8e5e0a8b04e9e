"""Where to draw the line between a paraphrase and another question, by the embedder's cosine.

    python -m tests.benchmarks.bench_meaning [DATA ...]

40 pairs that say the same in other words and 40 of the same topic that ask something else, all written for this
project, are told apart at several thresholds; MinHash's text similarity is printed beside them. For each DATA file
(JSONL or CSV) the number of pairs of its rows above each threshold follows, with the time it took.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from tune import near
from tune.meaning import close_pairs
from unshot.data.rows import read_examples
from unshot.engines.embedder import Embedder, find_embedder

SAME = [
    ("How do I reset my password?", "I forgot my password, how can I set a new one?"),
    ("My card has not arrived yet.", "I am still waiting for my card to be delivered."),
    ("Can I get a refund for this order?", "Is it possible to have my money back for this purchase?"),
    ("What time do you open on Sundays?", "At what hour does your shop open on Sunday?"),
    ("Please cancel my subscription.", "I would like to end my subscription."),
    ("The app crashes when I start it.", "Every time I launch the application it crashes."),
    ("How much does shipping to Canada cost?", "What is the price of delivery to Canada?"),
    ("I was charged twice for the same thing.", "The same payment was taken from my account two times."),
    ("Where can I download my invoice?", "How do I get a copy of my invoice?"),
    ("Do you ship internationally?", "Can you deliver to other countries?"),
    (
        "The tenant shall pay the rent on the first of each month.",
        "On the first of every month rent is due.",
    ),
    (
        "Either party may end this agreement with thirty days' notice.",
        "Each side can terminate with 30 days' notice.",
    ),
    (
        "The supplier is not liable for indirect damage.",
        "Indirect losses are excluded from the supplier's liability.",
    ),
    ("How long does a transfer take?", "When will my transfer arrive?"),
    ("My account has been blocked.", "I can no longer get into my account because it is locked."),
    ("How do I change my delivery address?", "I need to update the address my parcel is sent to."),
    ("The battery runs down very fast.", "My battery does not last long."),
    ("Is breakfast included in the price?", "Does the rate include breakfast?"),
    ("I want to speak to a human.", "Can I talk to a real person, please?"),
    ("What documents do I need to open an account?", "Which papers are required for opening an account?"),
    ("The patient complains of a severe headache.", "The patient reports strong pain in the head."),
    ("Turn off the lights in the kitchen.", "Switch the kitchen lights off."),
    ("Play some relaxing music.", "Put on some calm music."),
    ("What will the weather be like tomorrow?", "Give me tomorrow's weather forecast."),
    ("Book a table for two at seven.", "Reserve a table for 2 people at 7 o'clock."),
    ("The film was boring and far too long.", "It was a dull movie that went on too long."),
    ("I love this phone, the camera is excellent.", "Great phone, I adore its superb camera."),
    ("How do I delete my account?", "I want my account to be removed, what should I do?"),
    ("Why was my payment declined?", "What is the reason my payment did not go through?"),
    ("Can I pay with PayPal?", "Do you accept PayPal as a payment method?"),
    ("My luggage got lost on the flight.", "The airline lost my suitcase."),
    ("How many vacation days do I have left?", "What is my remaining holiday allowance?"),
    ("The printer is out of paper.", "There is no paper left in the printer."),
    ("Which size should I order?", "What size would fit me?"),
    ("I cannot hear anything on the call.", "There is no sound during the call."),
    ("Please send me the report by Friday.", "I need the report from you by the end of Friday."),
    ("The website is very slow today.", "Today your site takes ages to load."),
    ("How can I become a member?", "What do I have to do to join as a member?"),
    ("Is there a student discount?", "Do students get a reduced price?"),
    ("My card was stolen, please block it.", "Somebody stole my card, I need it frozen."),
]
OTHER = [
    ("How do I reset my password?", "How do I change my user name?"),
    ("My card has not arrived yet.", "My card has expired."),
    ("Can I get a refund for this order?", "Can I change the address of this order?"),
    ("What time do you open on Sundays?", "Do you have parking on Sundays?"),
    ("Please cancel my subscription.", "Please renew my subscription."),
    ("The app crashes when I start it.", "The app does not send notifications."),
    ("How much does shipping to Canada cost?", "How long does shipping to Canada take?"),
    ("I was charged twice for the same thing.", "I was charged a fee for a withdrawal."),
    ("Where can I download my invoice?", "Where can I pay my invoice?"),
    ("Do you ship internationally?", "Do you gift-wrap parcels?"),
    ("The tenant shall pay the rent on the first of each month.", "The tenant shall keep the garden tidy."),
    ("Either party may end this agreement with thirty days' notice.", "Either party may assign this agreement."),
    ("The supplier is not liable for indirect damage.", "The supplier is liable for damage without any limit."),
    ("How long does a transfer take?", "How much does a transfer cost?"),
    ("My account has been blocked.", "My account shows the wrong balance."),
    ("How do I change my delivery address?", "How do I change my delivery date?"),
    ("The battery runs down very fast.", "The battery does not charge at all."),
    ("Is breakfast included in the price?", "Is parking included in the price?"),
    ("I want to speak to a human.", "I want to speak about my contract."),
    ("What documents do I need to open an account?", "What documents do I need to apply for a loan?"),
    ("The patient complains of a severe headache.", "The patient complains of pain in the left knee."),
    ("Turn off the lights in the kitchen.", "Turn on the lights in the bedroom."),
    ("Play some relaxing music.", "Stop the music."),
    ("What will the weather be like tomorrow?", "What was the weather like yesterday?"),
    ("Book a table for two at seven.", "Cancel my table for two at seven."),
    ("The film was boring and far too long.", "The film was thrilling from start to end."),
    ("I love this phone, the camera is excellent.", "I hate this phone, the camera is poor."),
    ("How do I delete my account?", "How do I open a second account?"),
    ("Why was my payment declined?", "Why is my payment still pending?"),
    ("Can I pay with PayPal?", "Can I pay in three instalments?"),
    ("My luggage got lost on the flight.", "My flight was delayed by five hours."),
    ("How many vacation days do I have left?", "How do I request vacation days?"),
    ("The printer is out of paper.", "The printer is not connected to the network."),
    ("Which size should I order?", "Which colour should I order?"),
    ("I cannot hear anything on the call.", "I cannot join the call."),
    ("Please send me the report by Friday.", "Please review the report I sent on Friday."),
    ("The website is very slow today.", "The website does not accept my e-mail address."),
    ("How can I become a member?", "How can I end my membership?"),
    ("Is there a student discount?", "Is there a senior discount?"),
    ("My card was stolen, please block it.", "My card was found, please unblock it."),
]  # fmt: skip
THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def main() -> None:
    """Print the tables."""
    path = find_embedder(None)
    if path is None:
        sys.exit("no embedder; run `pip install 'unshot[embed]'`")
    embedder = Embedder(path)

    def cosines(pairs: list[tuple[str, str]]) -> np.ndarray:
        left, right = embedder.sentences([a for a, _ in pairs]), embedder.sentences([b for _, b in pairs])
        return (left * right).sum(axis=1)

    def texts(pairs: list[tuple[str, str]]) -> np.ndarray:
        none = np.empty(0, dtype=np.uint32)
        return np.array([near.jaccard(near.shingles(a, none), near.shingles(b, none)) for a, b in pairs])

    same, other = cosines(SAME), cosines(OTHER)
    print(
        f"cosine, {embedder.name}: median of paraphrases {np.median(same):.3f}, of others {np.median(other):.3f}"
    )
    for threshold in THRESHOLDS:
        hit, wrong = int((same >= threshold).sum()), int((other >= threshold).sum())
        print(
            f"  {threshold:.2f}: {hit}/{len(SAME)} paraphrases found, {wrong}/{len(OTHER)} others taken for one"
        )
    caught = int((texts(SAME) >= near.THRESHOLD).sum()), int((texts(OTHER) >= near.THRESHOLD).sum())
    print(f"text similarity {near.THRESHOLD}: {caught[0]} paraphrases, {caught[1]} others")
    for name in sys.argv[1:]:
        rows = [row.text for row in read_examples(Path(name))]
        start = time.perf_counter()
        vectors = embedder.sentences(rows)
        embedded = time.perf_counter() - start
        _, _, similarity = close_pairs(vectors, min(THRESHOLDS))
        seconds = time.perf_counter() - start
        counts = ", ".join(f"{t:.2f}: {int((similarity >= t).sum())}" for t in THRESHOLDS)
        print(f"{name}: {len(rows)} rows, {seconds:.1f} s ({embedded:.1f} s of it embedding); pairs {counts}")


if __name__ == "__main__":
    main()
