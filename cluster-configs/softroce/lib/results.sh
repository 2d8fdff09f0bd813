# shellcheck shell=bash
# Results: one line a check as it is known, in TAP's words; all of them as one JSON at the end.

PASSED=0 FAILED=0 SKIPPED=0
FIGURES=()
SUITES_JSON=() CHECKS_JSON=()

json_string() { # text
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"} text=${text//$'\n'/\\n} text=${text//$'\t'/\\t}
  # Control characters that a console may have left in a text have no meaning here.
  printf '"%s"' "${text//[$'\x01'-$'\x1f']/}"
}

join() { local IFS=,; printf '%s' "$*"; }

# A figure of the check that is about to be told: name, value, unit.
figure() {
  FIGURES+=("$1"$'\t'"$2"$'\t'"$3")
}

figures_text() {
  local one name value unit text=''
  for one in ${FIGURES[@]+"${FIGURES[@]}"}; do
    IFS=$'\t' read -r name value unit <<<"$one"
    text+="${text:+, }$name $value${unit:+ $unit}"
  done
  printf '%s' "$text"
}

figures_json() {
  local one name value unit all=()
  for one in ${FIGURES[@]+"${FIGURES[@]}"}; do
    IFS=$'\t' read -r name value unit <<<"$one"
    [[ $value =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || value=$(json_string "$value")
    all+=("{\"name\":$(json_string "$name"),\"value\":$value,\"unit\":$(json_string "$unit")}")
  done
  join ${all[@]+"${all[@]}"}
}

# Tells a check: result (ok, failed, skipped), name, and a remark, for the latter two why.
tell_check() {
  local result=$1 name=$2 why=${3-} figures number
  figures=$(figures_text)
  [ "$result" != ok ] || [ -z "$why" ] || figures+="${figures:+, }$why"
  number=$((PASSED + FAILED + SKIPPED + 1))
  case $result in
    ok) PASSED=$((PASSED + 1)); printf 'ok %d %s: %s%s\n' "$number" "$SUITE" "$name" "${figures:+ - $figures}" ;;
    failed) FAILED=$((FAILED + 1)); printf 'not ok %d %s: %s%s - %s\n' "$number" "$SUITE" "$name" "${figures:+ - $figures}" "$why" ;;
    skipped) SKIPPED=$((SKIPPED + 1)); printf 'ok %d %s: %s # SKIP %s\n' "$number" "$SUITE" "$name" "$why" ;;
  esac
  CHECKS_JSON+=("{\"name\":$(json_string "$name"),\"result\":\"$result\",\"remark\":$(json_string "$why"),\"figures\":[$(figures_json)]}")
  FIGURES=()
}

ok() { tell_check ok "$1" "${2-}"; }
not_ok() { tell_check failed "$1" "${2:-}"; }
skip() { tell_check skipped "$1" "$2"; }

# Runs a command and tells whether it succeeded; what failed is the last words of SAID_IN.
check() { # name, command...
  local name=$1 code=0
  shift
  "$@" || code=$?
  case $code in
    0) ok "$name" ;;
    124) not_ok "$name" "did not end in time: $(last_words "$SAID_IN")" ;;
    125) not_ok "$name" "its host ended: $(last_words "$SAID_IN")" ;;
    *) not_ok "$name" "exit code $code: $(last_words "$SAID_IN")" ;;
  esac
  return 0
}

# Prints a line of a table or a remark between checks, as TAP wants it.
remark() { printf '#   %s\n' "$*"; }

end_suite() { # seconds, arguments as text
  SUITES_JSON+=("{\"suite\":$(json_string "$SUITE"),\"seconds\":$1,\"arguments\":$(json_string "$2"),\"checks\":[$(join ${CHECKS_JSON[@]+"${CHECKS_JSON[@]}"})]}")
  CHECKS_JSON=()
}

results_json() {
  printf '{"lab":1,"belay":%s,"kernel":%s,"qemu":%s,"machine":%s,"fabric":%s,"seed":%s,"seconds":%s,"peak_host_memory_mib":[%d,%d],"passed":%d,"failed":%d,"skipped":%d,"suites":[%s]}\n' \
    "$(json_string "$BELAY_VERSION")" "$(json_string "${KERNEL_RELEASE-}")" "$(json_string "$QEMU_VERSION")" \
    "$(json_string "$(uname -r), $(nproc) cores")" "$(json_string "${FABRICS-$FABRIC}")" "$SEED" "$(lab_seconds)" "${PEAK_MIB[a]}" "${PEAK_MIB[b]}" \
    "$PASSED" "$FAILED" "$SKIPPED" "$(join ${SUITES_JSON[@]+"${SUITES_JSON[@]}"})"
}
