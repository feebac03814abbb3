"""The forms that the shared tables of cases are run against on this machine. A new form adds its name here."""

IMPLEMENTATIONS = ["xla"]
