# shellcheck shell=bash
# conformance: the tests that every fabric must pass, run inside a host over its own rxe0: both ends of a session on one host.

ABOUT="belay's fabric conformance tests, and the other tests that need an RDMA device, inside a host"
NEEDS=(belay transport-tests)

run_suite() {
  local fabric
  for fabric in $FABRICS; do
    case $fabric in
      tcp) run_tests conformance tcp:: ;;
      verbs)
        # TLS changes what the control stream does and nothing of the lanes, and costs an emulated host most of the time.
        run_tests conformance verbs::
        [ -n "$QUICK" ] || run_tests conformance verbs_tls::
        run_tests fabrics ''
        run_tests verbs ''
        run_tests verbs_registration ''
        # The others there need no device and run with `cargo test`.
        run_tests belay_transport fabric::verbs::rdma_tests::
        ;;
    esac
  done
}
