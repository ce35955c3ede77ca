//! An error as one line of text, for logs, reports and the reasons that travel inside other errors.

use std::error::Error;

/// An error and its causes on one line, separated by `: `. A cause that is quoted already is left out.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    #[test]
    fn causes_follow_and_quoted_ones_do_not() {
        let layer = |text, source: Option<Layer>| Layer { text, source: source.map(Box::new) };
        let error = layer("cannot mount", Some(layer("cannot read: disk", Some(layer("disk", None)))));
        assert_eq!(chain(&error), "cannot mount: cannot read: disk");
        assert_eq!(chain(&layer("alone", None)), "alone");
    }
}
