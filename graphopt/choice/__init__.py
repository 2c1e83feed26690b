"""Which scheme runs a batch: prices, measured steps, what is kept of them, and when to look again."""

from graphopt.choice.choice import Choice
from graphopt.choice.landscape import Belief, Landscape
from graphopt.choice.pace import Pace
from graphopt.choice.prices import Prices
from graphopt.choice.race import Race
from graphopt.choice.records import Records

__all__ = ["Belief", "Choice", "Landscape", "Pace", "Prices", "Race", "Records"]
