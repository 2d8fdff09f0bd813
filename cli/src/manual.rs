//! `belay completions` and `belay man`: both are made of the same description of the command line that parses it.

use crate::complain;
use crate::exit::Exit;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Print completions for a shell
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay completions bash > /etc/bash_completion.d/belay
  belay completions zsh > ~/.zfunc/_belay
  belay completions fish > ~/.config/fish/completions/belay.fish")]
pub struct CompletionsArgs {
    #[arg(value_enum)]
    shell: Shell,
}

/// Print the manual page of belay, or write those of all commands
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Examples:
  belay man | man -l -
  belay man --out /usr/local/share/man/man1")]
pub struct ManArgs {
    /// Write belay.1 and a page for each command into this directory, which is made if need be
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs `belay completions`.
pub fn completions(args: &CompletionsArgs) -> Exit {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut crate::Cli::command(), "belay", &mut text);
    printed(&text)
}

/// Runs `belay man`.
pub fn man(args: &ManArgs) -> Exit {
    let command = crate::Cli::command();
    let Some(out) = &args.out else {
        return match page(&command, "belay") {
            Ok(text) => printed(&text),
            Err(error) => failed(&error, Path::new("the page")),
        };
    };
    match write_all(&command, out) {
        Ok(pages) => printed(format!("{pages} pages in {}\n", out.display()).as_bytes()),
        Err((path, error)) => failed(&error, &path),
    }
}

fn write_all(command: &Command, out: &Path) -> Result<usize, (PathBuf, io::Error)> {
    fs::create_dir_all(out).map_err(|error| (out.to_owned(), error))?;
    let mut pages = 0;
    let subcommands = command.get_subcommands().filter(|sub| !sub.is_hide_set());
    let names = subcommands.map(|sub| (format!("belay-{}", sub.get_name()), sub));
    for (name, command) in std::iter::once(("belay".to_owned(), command)).chain(names) {
        let path = out.join(format!("{name}.1"));
        page(command, &name).and_then(|text| fs::write(&path, text)).map_err(|error| (path, error))?;
        pages += 1;
    }
    Ok(pages)
}

/// One command's page.
fn page(command: &Command, name: &str) -> io::Result<Vec<u8>> {
    let spoken = name.replacen('-', " ", 1);
    let version = concat!("belay ", env!("CARGO_PKG_VERSION"));
    let command = command.clone().bin_name(spoken).disable_help_subcommand(true);
    let mut text = Vec::new();
    Man::new(command).title(name.to_uppercase()).source(version).manual("belay").render(&mut text)?;
    Ok(text)
}

/// A reader that went away has read enough.
fn printed(text: &[u8]) -> Exit {
    let mut out = io::stdout().lock();
    match out.write_all(text).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => failed(&error, Path::new("stdout")),
        _ => Exit::Done,
    }
}

fn failed(error: &io::Error, path: &Path) -> Exit {
    eprintln!("belay: cannot write {}", path.display());
    complain(error, "Is there room, and may you write there?");
    Exit::Failed
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::ValueEnum;

    /// Each visible command with its long options.
    fn options() -> Vec<(String, Vec<String>)> {
        let command = crate::Cli::command();
        let visible = command.get_subcommands().filter(|sub| !sub.is_hide_set());
        let of = |sub: &Command| {
            let options = sub.get_arguments().filter(|option| !option.is_hide_set());
            options.filter_map(|option| option.get_long().map(str::to_owned)).collect()
        };
        visible.map(|sub| (sub.get_name().to_owned(), of(sub))).collect()
    }

    #[test]
    fn each_command_and_option_is_in_the_completions_of_every_shell() {
        let commands = options();
        assert!(commands.len() > 10, "{commands:?}");
        for shell in Shell::value_variants() {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut crate::Cli::command(), "belay", &mut text);
            let text = String::from_utf8(text).expect("UTF-8");
            for (command, options) in &commands {
                assert!(text.contains(command), "{shell}: {command}");
                for option in options {
                    assert!(text.contains(option), "{shell}: {command} --{option}");
                }
            }
        }
    }

    #[test]
    fn each_command_has_a_manual_page_with_all_its_options() {
        let out = tempfile::tempdir().expect("a directory");
        let pages = write_all(&crate::Cli::command(), &out.path().join("man1")).expect("writable");
        let commands = options();
        assert_eq!(pages, commands.len() + 1);
        let read = |name: &str| fs::read_to_string(out.path().join("man1").join(name)).expect("written");
        let first = read("belay.1");
        for (command, options) in &commands {
            assert!(first.contains(&command.replace('-', "\\-")), "{command} in belay.1");
            let text = read(&format!("belay-{command}.1"));
            assert!(text.contains(".TH BELAY\\-") || text.contains(".TH BELAY-"), "{text}");
            for option in options {
                let escaped = format!("\\-\\-{}", option.replace('-', "\\-"));
                assert!(text.contains(&escaped), "{command} --{option}");
            }
        }
    }
}
