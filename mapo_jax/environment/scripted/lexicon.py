"""What the scripted user says: sentence frames with slots, small and regular, for a tiny model to read.

Slots: {p} a particular of the situation, {f} a stated feeling, {v} the value, {s} a strength, {t} a step.
A slot never opens a sentence, so that a phrase looks the same wherever it stands and can be copied.
"""

from __future__ import annotations

PARTICULAR = (
    "I keep thinking about {p}.",
    "It always comes back to {p}.",
    "I can not shake off {p}.",
    "Then there is {p} again.",
    "I never know what to do with {p}.",
    "All I see is {p}.",
    "I talk to nobody about {p}.",
    "Most nights I lie awake over {p}.",
    "My mind goes straight to {p}.",
    "I still wake up with {p}.",
    "I did not ask for {p}.",
    "I can not get used to {p}.",
    "Everything circles around {p}.",
    "I dread {p}.",
)
MEMORY = (
    "It takes me back to {p}.",
    "I am back at {p} now.",
    "Today it is {p} again.",
    "I thought I was done with {p}.",
    "Last night I dreamt of {p}.",
    "Talking brings up {p} once more.",
)
ASIDE = (
    "This is not about {p} any more.",
    "I do not mean {p} now.",
    "Leave {p} aside for now.",
    "I can almost laugh about {p} by now.",
)
FEELING = (
    "I feel {f}.",
    "I just feel {f}.",
    "Mostly I feel {f}.",
    "It makes me {f}.",
    "I am so {f}.",
    "I get {f} over it.",
    "By evening I am {f}.",
    "I have been {f} for weeks.",
    "I woke up {f} again.",
    "I went to bed {f}.",
)
VALUE = (
    "I was taught that {v} must come first.",
    "I still believe that {v} should count.",
    "I used to think {v} would be enough.",
    "My mother said {v} would carry me.",
    "I wanted {v} to mean something.",
    "I thought {v} could not be broken.",
    "I built my life on {v}.",
    "I ask myself if {v} was worth it.",
)
STRENGTH = (
    "All I manage is {s}.",
    "I am still {s}, but so what.",
    "I kept on {s}.",
    "My days are mostly {s}.",
    "I went on {s} anyway.",
    "What I do have is {s}.",
    "I do not stop {s}.",
    "Some days it is only {s}.",
)
STEP = (
    "Maybe there could be {t}.",
    "I thought about {t}.",
    "I could picture {t}.",
    "There might be {t}.",
    "I keep putting off {t}.",
    "I almost planned {t}.",
    "A friend mentioned {t}.",
    "I wonder about {t}.",
)
# Said instead of the feeling itself; never contains its word.
HINTS = {
    "ashamed": ("I wanted the floor to swallow me.", "I hope nobody ever finds out."),
    "guilty": ("I keep saying sorry in my head.", "Others pay for my mistake now."),
    "unseen": ("They talk as if I were air.", "I could vanish and they would go on."),
    "powerless": ("My hands are tied.", "I push and nothing moves."),
    "unworthy": ("Others deserve it more than me.", "I am not good enough for this."),
    "abandoned": ("They all left when it got hard.", "There is no one left to call."),
    "betrayed": ("They went behind my back.", "They lied to my face."),
    "afraid": ("What if it all falls apart?", "I lie there and my heart races."),
}
# How the user takes the last reply: the first words of the next message.
REACTIONS = {
    "unstated": (
        "I never said that aloud.",
        "How did you know?",
        "That goes deep.",
        "I had no word for it.",
        "You saw it before I did.",
    ),
    "feeling": (
        "Yes, I do.",
        "Yes, that is how it is.",
        "It helps to hear that.",
        "You noticed.",
        "That is true.",
    ),
    "situation": ("Yes, exactly.", "That is it.", "You got that right.", "Yes, all of it.", "Right."),
    "reframe": (
        "I never saw it that way.",
        "That changes something.",
        "So it was not for nothing.",
        "I have to think about that.",
        "Maybe that is why.",
    ),
    "strength": (
        "I forget that I do that.",
        "Somebody saw it.",
        "I do, that is so.",
        "It did cost me something.",
    ),
    "step": (
        "That I could do.",
        "It is mine to choose, then.",
        "That sounds possible.",
        "I would like that.",
        "A small thing, but mine.",
    ),
    "repaired": (
        "Thank you for saying that.",
        "All right, I will try again.",
        "I am glad you noticed.",
        "Good, then let me start over.",
    ),
    "misread": (
        "No, that is not it.",
        "You mix that up.",
        "That is not what I said.",
        "No, you are thinking of someone else.",
        "I never said that.",
    ),
    "stale": (
        "That was before.",
        "I am past that by now.",
        "We had that already.",
        "That is not it any more.",
    ),
    "early": (
        "Not so fast.",
        "You hardly know me.",
        "I am not there yet.",
        "Wait, you do not know the half of it.",
    ),
    "pushed": (
        "Please do not push me.",
        "I did not ask for a plan.",
        "Do not tell me what to do.",
        "You make it sound easy.",
    ),
    "empty": (
        "Everybody says that.",
        "That could be from a card.",
        "Those are just words.",
        "I have heard that before.",
    ),
    "hurtful": ("Ouch.", "That is not fair.", "I knew I should not talk.", "That hurts to hear."),
    "routine": ("You said that already.", "You sound like a tape.", "Again.", "You keep doing that."),
    "lost": ("I can not follow you.", "What do you mean?", "That makes no sense to me.", "I do not get it."),
    "ignored": (
        "You did not hear me.",
        "That passes me by.",
        "You are somewhere else.",
        "I do not think you listen.",
    ),
    "silent": ("Are you there?", "Hello?", "You say nothing.", "Did I lose you?"),
    "shallow": (
        "There is more to it.",
        "That is only the surface.",
        "It goes on, though.",
        "But that is not all.",
    ),
    "asked": ("Let me see.", "Good question.", "You ask.", "Where do I start?"),
}
CURT = (
    "Never mind.",
    "If you say so.",
    "Forget it.",
    "I would rather stop here.",
    "It does not matter.",
    "Fine.",
    "Leave it.",
    "I do not know any more.",
    "Let us not.",
    "I will keep it to myself.",
)
CURT_PARTICULAR = (
    "It is just {p}.",
    "I only have {p}, that is all.",
    "Well, {p}.",
    "So much for {p}.",
    "There is {p}, as I said.",
)
TURNING = (
    "Something happened today.",
    "There was a call this morning.",
    "A message came last night.",
    "I ran into somebody today.",
)
# Idle sentences that only keep a long dialogue from repeating itself.
IDLE = (
    "It is late here.",
    "I made some tea.",
    "The street is quiet.",
    "I lost track of time.",
    "It rains outside.",
    "My tea went cold.",
    "The house is dark.",
    "I can hear the clock.",
    "The light is still on.",
    "I opened the window.",
)
