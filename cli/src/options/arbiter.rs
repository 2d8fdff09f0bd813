//! The arbiter: which one, by what name it knows the guest, and what a destination does with it when its source is lost.

use super::choices::SourceLossChoice;
use belay_checkpoint::arbiter::GuestName;
use belay_checkpoint::arbiter::etcd::Endpoint;
use belay_vmm_glue::migrate::arbitration::Arbitration;
use belay_vmm_glue::migrate::destination::DestinationArbiter;
use clap::Args;
use serde::{Deserialize, Serialize};

/// Which arbiter, and which guest.
#[derive(Debug, Clone, Default, Args, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
#[command(next_help_heading = "Arbiter")]
pub struct ArbiterOptions {
    /// An etcd whose record of the guest says who may run it: a catch, and a destination that goes on alone, change it first. Say the same on
    /// both hosts; in clear, so on a link you trust
    #[arg(long, value_name = "http://HOST:PORT", requires = "guest_name")]
    pub arbiter: Option<String>,
    /// What this guest is called there, the same on both hosts: letters, digits, '.', '_' and '-'
    #[arg(long, value_name = "NAME")]
    pub guest_name: Option<String>,
}

/// What a destination does with it.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Arbiter")]
pub struct SourceLossOptions {
    /// What becomes of a guest whose source is lost and all of whose pages are here: it stays stopped until its source or you say more, or it
    /// goes on here as soon as the arbiter agrees, which takes --arbiter [default: fence]
    #[arg(long, value_enum, value_name = "WHAT")]
    pub on_source_loss: Option<SourceLossChoice>,
}

/// Both, in a file that both hosts may read.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct ArbiterTable {
    pub arbiter: Option<String>,
    pub guest_name: Option<String>,
    pub on_source_loss: Option<SourceLossChoice>,
}

impl ArbiterOptions {
    /// Fills what the command line left open.
    pub fn or(mut self, other: Self) -> Self {
        self.arbiter = self.arbiter.or(other.arbiter);
        self.guest_name = self.guest_name.or(other.guest_name);
        self
    }

    /// The arbiter that these describe; what is wrong with them. Whoever believes that there is one must not go without.
    pub fn arbitration(&self) -> Result<Option<Arbitration>, String> {
        let (endpoint, guest) = match (&self.arbiter, &self.guest_name) {
            (None, None) => return Ok(None),
            (Some(endpoint), Some(guest)) => (endpoint, guest),
            (Some(_), None) => {
                return Err("--arbiter without --guest-name: say what the guest is called there".to_owned());
            }
            (None, Some(_)) => return Err("--guest-name without --arbiter: say http://HOST:2379 of an etcd".to_owned()),
        };
        let endpoint: Endpoint = endpoint.parse().map_err(|error| format!("--arbiter: {error}"))?;
        let guest: GuestName = guest.parse().map_err(|error| format!("--guest-name: {error}"))?;
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        if host.is_empty() {
            return Err(
                "--arbiter: this host has no name by which the arbiter could know it (/proc/sys/kernel/hostname)"
                    .to_owned(),
            );
        }
        Ok(Some(Arbitration { endpoint, guest, host }))
    }
}

impl SourceLossOptions {
    /// Fills what the command line left open.
    pub fn or(mut self, file: Option<SourceLossChoice>) -> Self {
        self.on_source_loss = self.on_source_loss.or(file);
        self
    }

    /// What a destination makes of the arbiter; what is wrong with that.
    pub fn of(&self, arbiter: &ArbiterOptions) -> Result<Option<DestinationArbiter>, String> {
        let goes_on_alone = self.on_source_loss == Some(SourceLossChoice::Continue);
        match arbiter.arbitration()? {
            Some(arbitration) => Ok(Some(DestinationArbiter { arbitration, goes_on_alone })),
            None if goes_on_alone => Err("--on-source-loss continue without an arbiter: the source may be alive and have the guest. Add --arbiter \
                                          http://HOST:2379 --guest-name NAME, here and at `belay send`; without one a destination that lost its source \
                                          is fenced with its memory kept, and `belay promote` is your word"
                .to_owned()),
            None => Ok(None),
        }
    }
}

impl ArbiterTable {
    /// Its two halves.
    pub fn parts(self) -> (ArbiterOptions, Option<SourceLossChoice>) {
        let Self { arbiter, guest_name, on_source_loss } = self;
        (ArbiterOptions { arbiter, guest_name }, on_source_loss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(text: &str) -> Result<Option<DestinationArbiter>, String> {
        let (options, loss) = toml::from_str::<ArbiterTable>(text).expect("reads").parts();
        SourceLossOptions::default().or(loss).of(&options)
    }

    #[test]
    fn p2_a_guest_goes_on_alone_only_with_an_arbiter_and_half_of_one_is_refused_with_what_is_missing() {
        assert_eq!(both(""), Ok(None));
        assert_eq!(both("on-source-loss = \"fence\""), Ok(None));
        for (wrong, missing) in [
            ("on-source-loss = \"continue\"", "--arbiter http://"),
            ("on-source-loss = \"continue\"\nguest-name = \"vm1\"", "--arbiter"),
            ("arbiter = \"http://127.0.0.1:2379\"", "--guest-name"),
            ("arbiter = \"https://127.0.0.1:2379\"\nguest-name = \"vm1\"", "http://HOST:PORT"),
            ("arbiter = \"http://127.0.0.1:2379\"\nguest-name = \"vm 1\"", "'.', '_' and '-'"),
        ] {
            let said = both(wrong).expect_err(wrong);
            assert!(said.contains(missing), "{said}");
        }
        let whole = "arbiter = \"http://127.0.0.1:2379\"\nguest-name = \"vm1\"\n";
        assert!(!both(whole).expect("fits").expect("there").goes_on_alone);
        assert!(both(&format!("{whole}on-source-loss = \"continue\"")).expect("fits").expect("there").goes_on_alone);
    }

    #[test]
    fn the_command_lines_arbiter_wins_over_the_files_key_by_key() {
        let file =
            toml::from_str::<ArbiterTable>("arbiter = \"http://a:1\"\nguest-name = \"of-the-file\"").expect("reads");
        let line = ArbiterOptions { guest_name: Some("of-the-line".to_owned()), ..ArbiterOptions::default() };
        let arbitration = line.or(file.parts().0).arbitration().expect("fits").expect("named");
        assert_eq!(
            (arbitration.guest.to_string(), arbitration.endpoint.to_string()),
            ("of-the-line".into(), "http://a:1".into())
        );
    }
}
