//! What happened in a life, or in many.

/// What happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lived {
    pub epochs: u64,
    pub lives: u64,
    pub caught: u64,
    pub released: u64,
    pub reattached: u64,
    pub source_deaths: u64,
    pub halfway_through_a_fold: u64,
    pub cut_short: u64,
    pub in_parts: u64,
    pub not_yet_known: u64,
    pub torn: u64,
    pub shown: u64,
    pub sent_again: u64,
}

impl Lived {
    pub fn add(&mut self, other: &Self) {
        self.epochs += other.epochs;
        self.lives += other.lives;
        self.caught += other.caught;
        self.released += other.released;
        self.reattached += other.reattached;
        self.source_deaths += other.source_deaths;
        self.halfway_through_a_fold += other.halfway_through_a_fold;
        self.cut_short += other.cut_short;
        self.in_parts += other.in_parts;
        self.not_yet_known += other.not_yet_known;
        self.torn += other.torn;
        self.shown += other.shown;
        self.sent_again += other.sent_again;
    }

    pub fn reached_everything(&self) -> bool {
        let Self { caught, released, reattached, source_deaths, halfway_through_a_fold, cut_short, .. } = *self;
        let Self { in_parts, not_yet_known, torn, shown, sent_again, .. } = *self;
        let all = [
            caught,
            released,
            reattached,
            source_deaths,
            halfway_through_a_fold,
            cut_short,
            in_parts,
            not_yet_known,
            torn,
            shown,
            sent_again,
        ];
        all.iter().all(|&times| times > 100)
    }
}
