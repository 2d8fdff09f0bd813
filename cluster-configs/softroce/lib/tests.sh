# shellcheck shell=bash
# belay's own tests, run inside a host; each is a check.

# Runs one test executable inside host a, with a filter on the tests' names; each test is a check.
run_tests() { # executable, filter
  local code=0 name result before=$((PASSED + FAILED + SKIPPED))
  if [ ! -e "$OUT/bin/$1" ]; then
    not_ok "$1" 'there is no test executable of this name'
    return
  fi
  LABEL="tests-$1" on a 300 "export BELAY_VERBS_DEVICE=rxe0 RUST_BACKTRACE=0 TMPDIR=/tmp; exec /lab/bin/$1 $2 --test-threads=1 --show-output" || code=$?
  while IFS=$'\t' read -r result name; do
    case $result in
      ok) ok "$1: $name" ;;
      ignored) skip "$1: $name" 'ignored by default' ;;
      skipped) skip "$1: ${name%%$'\v'*}" "${name#*$'\v'}" ;;
      *) not_ok "$1: $name" "$(test_words "$name")" ;;
    esac
  done < <(libtest_results)
  case $code in
    0 | 101) [ $((PASSED + FAILED + SKIPPED)) -gt "$before" ] || not_ok "$1 ${2:-all}" 'no test has such a name' ;;
    124) not_ok "$1: all tests in time" "the last one begun: $(grep '^test ' "$SAID_IN.out" | tail -1)" ;;
    *) not_ok "$1: all tests ran" "exit code $code: $(last_words "$SAID_IN")" ;;
  esac
}

# Lines of `result <tab> name`, of what libtest printed. A test that could not run says "skipped: why" in its output.
libtest_results() {
  awk '
    /^test .* \.\.\. / { result[++n] = $NF; name[n] = $2 }
    /^---- .* stdout ----$/ { of = $2 }
    /^skipped: / { if (!(of in why)) why[of] = substr($0, 10) }
    END {
      for (i = 1; i <= n; i++)
        if (result[i] == "ok" && name[i] in why) printf "skipped\t%s\v%s\n", name[i], why[name[i]]
        else printf "%s\t%s\n", result[i], name[i]
    }' "$SAID_IN.out"
}

# What a failed test said last.
test_words() { # name
  awk -v head="---- $1 stdout ----" '$0 == head {on = 1; next} /^---- / {on = 0} on && NF' "$SAID_IN.out" | tail -4 | tr '\n' ' ' | cut -c1-400
}
