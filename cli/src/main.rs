//! The `belay` command.

fn main() -> std::process::ExitCode {
    belay_command::main()
}
