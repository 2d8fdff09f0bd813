# shellcheck shell=bash
# Sums on figures: medians and comparisons of decimal numbers, which bash has not.

# The median of the numbers given; of an even count the mean of the middle two.
median() { # words
  # shellcheck disable=SC2086 # words are wanted
  printf '%s\n' $1 | sort -g | awk '{v[NR] = $1} END {if (NR % 2) print v[(NR + 1) / 2]; else print (v[NR / 2] + v[NR / 2 + 1]) / 2}'
}

# Evaluates an expression of awk; succeeds when it is true.
holds() { awk "BEGIN {exit !($1)}" 2>/dev/null; }

# Prints an expression's value with so many decimals; of one that lacks a number, nothing.
calculate() { awk "BEGIN {printf \"%.${2:-2}f\", $1}" 2>/dev/null || true; }
