//! What makes sure that a lost destination is off before its guest is taken back.

use crate::quantity::Span;
use belay_vmm_glue::fence_hook::FenceHook;
use belay_vmm_glue::guard::GuardCommand;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::time::Duration;

const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// A hook that is given longer would keep a person waiting who could do the same by hand.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(3600);

/// The operator's fence.
#[derive(Debug, Clone, Default, Args, Deserialize, Serialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[command(next_help_heading = "Fencing")]
pub struct FenceOptions {
    /// Command (run by sh) that makes sure a lost destination is off: STONITH, SBD. Exit status 0 is proof, so that --output lease need not
    /// wait for you; anything else is told, and it is run again. It gets BELAY_FENCE_HOST, BELAY_FENCE_OWNER_EPOCH and BELAY_FENCE_MIGRATION
    #[arg(long, value_name = "COMMAND")]
    pub fence_hook: Option<String>,
    /// Longest that one run of the fence hook may take; it is then killed with what it started [default: 30s]
    #[arg(long, value_name = "TIME")]
    pub fence_timeout: Option<Span>,
    /// No catch at all goes on before the destination's death is proven, under --output commit neither, nor by your order
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub fence_always: bool,
}

impl FenceOptions {
    /// Fills what the command line left open from the file.
    pub fn or(mut self, file: Self) -> Self {
        self.fence_hook = self.fence_hook.or(file.fence_hook);
        self.fence_timeout = self.fence_timeout.or(file.fence_timeout);
        self.fence_always |= file.fence_always;
        self
    }

    /// The hook that these describe; what is wrong with them. Whoever believes that there is a fence must not go without.
    pub fn hook(&self) -> Result<Option<FenceHook>, String> {
        let timeout = self.fence_timeout.map_or(DEFAULT_TIMEOUT, |timeout| timeout.0);
        let Some(command) = &self.fence_hook else {
            return match self {
                Self { fence_always: true, .. } => Err("--fence-always without --fence-hook".to_owned()),
                Self { fence_timeout: Some(_), .. } => Err("--fence-timeout without --fence-hook".to_owned()),
                _ => Ok(None),
            };
        };
        if command.trim().is_empty() || command.contains('\0') {
            return Err("--fence-hook is no command: the shell would do nothing and call that a success".to_owned());
        }
        if timeout.is_zero() || timeout > LONGEST_TIMEOUT {
            return Err(format!(
                "a --fence-timeout of {timeout:?}; more than nothing and at most {LONGEST_TIMEOUT:?} is possible"
            ));
        }
        let holder = GuardCommand::this_program(&["hook", "--"]).map_err(|error| error.to_string())?;
        Ok(Some(FenceHook { command: command.into(), timeout, always: self.fence_always, holder }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> FenceOptions {
        toml::from_str(text).expect("reads")
    }

    #[test]
    fn a_fence_that_would_be_none_is_refused() {
        assert!(options("").hook().expect("nothing asked for").is_none());
        for wrong in [
            "fence-always = true",
            "fence-timeout = \"5s\"",
            "fence-hook = \" \"",
            "fence-hook = \"fence\"\nfence-timeout = \"0s\"",
            "fence-hook = \"fence\"\nfence-timeout = \"7200s\"",
        ] {
            assert!(options(wrong).hook().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_command_lines_fence_wins_over_the_files_key_by_key() {
        let file = options("fence-hook = \"of the file\"\nfence-timeout = \"7s\"\nfence-always = true");
        let line = FenceOptions { fence_hook: Some("of the line".to_owned()), ..FenceOptions::default() };
        let hook = line.or(file).hook().expect("fits").expect("named");
        assert_eq!((hook.command.to_str(), hook.timeout), (Some("of the line"), Duration::from_secs(7)));
        assert!(hook.always);
    }
}
